package ceph_test

import (
	"strings"
	"testing"
)

// TestCluster shows what tests of other packages rely on: what was acknowledged survives
// an OSD that is killed, and with cephx a user of one pool sees nothing of another.
func TestCluster(t *testing.T) {
	w := start(t)
	ctx, c := t.Context(), w.cluster
	asUser := func(args ...string) error {
		_, err := c.RBD(ctx, append([]string{"--id", "thaw"}, args...)...)
		return err
	}
	if err := asUser("create", "--size", "16M", "thaw/cluster-test"); err != nil {
		t.Fatal(err)
	}
	if err := asUser("create", "--size", "16M", "other/cluster-test"); err == nil {
		t.Error("a user of pool thaw created an image in pool other")
	}
	c.KillOSD()
	if err := c.StartOSD(ctx); err != nil {
		t.Fatal(err)
	}
	out, err := c.RBD(ctx, "ls", "thaw")
	if err != nil || !strings.Contains(string(out), "cluster-test") {
		t.Errorf("after the OSD was killed the pool lists %q, error %v", out, err)
	}
}
