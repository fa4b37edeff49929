package identity

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme"
)

// TestGolden: running hosts and stores know each other by these names.
func TestGolden(t *testing.T) {
	s := Store{uuid.MustParse("9e762855-72b8-505a-b08e-efa7cafc8d29")}
	for got, want := range map[string]string{
		HostNQN("node-1"):         "nqn.2014-08.org.nvmexpress:uuid:" + HostID("node-1").String(),
		s.Subsystem("node-1"):     "nqn.2025-01.io.github.thaw-project:9e762855-72b8-505a-b08e-efa7cafc8d29:node-1",
		HostID("node-1").String(): "591b0cf8-1054-58d7-98b1-861b77e3ad87",
		s.Serial("node-1"):        "1855ad138430d59fe95e",
		s.NvmeNamespace(uuid.MustParse("0b7a9f5e-5e0e-4d3b-9a59-0f9f0c1d2e3f"), "node-1").String(): "1a762664-f4e5-5d3e-970d-4b40dad786ec",
	} {
		if got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	for _, nqn := range []string{s.Subsystem(strings.Repeat("n", MaxNodeBytes)), s.Anchor(), HostNQN("a")} {
		if err := nvme.CheckNQN(nqn); err != nil {
			t.Error(err)
		}
	}
}

func TestDistinct(t *testing.T) {
	a, b := Store{uuid.New()}, Store{uuid.New()}
	x, y := uuid.New(), uuid.New()
	seen := map[string]bool{}
	for _, name := range []string{
		a.NvmeNamespace(x, "n").String(), a.NvmeNamespace(y, "n").String(), a.NvmeNamespace(x, "m").String(), b.NvmeNamespace(x, "n").String(),
		a.Subsystem("n"), a.Subsystem("m"), b.Subsystem("n"), a.Anchor(), b.Anchor(), a.Serial("n"), a.Serial("m"), b.Serial("n"),
		HostNQN("n"), HostNQN("m"), HostID("n").String(), HostID("m").String(),
	} {
		if seen[name] {
			t.Errorf("%s stands for two things", name)
		}
		seen[name] = true
	}
}

func TestCheckNode(t *testing.T) {
	for _, ok := range []string{"a", "node-1.example", "10.0.0.1"} {
		if err := CheckNode(ok); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{"", "A", "a/b", "a b", "a:b", ".a", "-a", "é", "a\x00b", strings.Repeat("a", MaxNodeBytes+1)} {
		if err := CheckNode(bad); !errors.Is(err, kind.Invalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
