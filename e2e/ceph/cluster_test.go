package ceph_test

import (
	"context"
	"os"
	"strings"
	"testing"

	"github.com/thaw-project/thaw/e2e/ceph"
	"github.com/thaw-project/thaw/e2e/lab"
)

// TestCluster shows what tests of other packages rely on: what was acknowledged survives
// an OSD that is killed, and with cephx a user of one pool sees nothing of another.
func TestCluster(t *testing.T) {
	if os.Getenv("THAW_CEPH") == "" {
		t.Skip("needs a Ceph cluster: make test-ceph")
	}
	l, err := lab.New()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}()
	ctx := context.Background()
	c, err := ceph.Start(ctx, l, ceph.Options{Pools: []string{"thaw", "other"}, Auth: true})
	if err != nil {
		t.Fatal(err)
	}
	key, err := c.User(ctx, "thaw", "thaw")
	if err != nil {
		t.Fatal(err)
	}
	asUser := func(args ...string) error {
		_, err := c.RBD(ctx, append([]string{"--id", "thaw", "--keyring", key}, args...)...)
		return err
	}
	if err := asUser("create", "--size", "16M", "thaw/a"); err != nil {
		t.Fatal(err)
	}
	if err := asUser("create", "--size", "16M", "other/a"); err == nil {
		t.Error("a user of pool thaw created an image in pool other")
	}
	c.KillOSD()
	if err := c.StartOSD(ctx); err != nil {
		t.Fatal(err)
	}
	out, err := c.RBD(ctx, "ls", "thaw")
	if err != nil || strings.TrimSpace(string(out)) != "a" {
		t.Errorf("after the OSD was killed the pool lists %q, error %v", out, err)
	}
}
