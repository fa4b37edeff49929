package identity_test

import (
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/attacher/identity"
)

// TestCard holds names that hosts and cards know disks by: they must never change.
func TestCard(t *testing.T) {
	c := identity.Card{Host: "host1"}
	disk, source := "block\x00soldier-1", "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"
	nqn, id := c.Subsystem(disk), c.NvmeNamespace(disk, source)
	for _, v := range []struct{ what, have, want string }{
		{"subsystem", nqn, "nqn.2025-01.io.github.thaw-project:card:host1:2d8bf594956abf8e0912d8d2791bd42d"},
		{"nvmeNamespace", id.String(), "38f6e2b8-b31d-5228-ab78-bd6eaf95f9b2"},
		{"serial", c.Serial(id), "d196f0a815057b3c1fdf"},
		{"remote", c.Remote("nqn.a", "nqn.b"), "thaw.d3ac0eec6c.d65ff3402408493b476d"},
	} {
		if v.have != v.want {
			t.Errorf("%s is %s", v.what, v.have)
		}
	}
	other := identity.Card{Host: "host"}
	switch {
	case !c.OwnsSubsystem(nqn) || !c.OwnsRemote(c.Remote("nqn.a", "nqn.b")):
		t.Error("a card does not know its own names")
	case other.OwnsSubsystem(nqn) || c.OwnsSubsystem(other.Subsystem(disk)) || other.OwnsRemote(c.Remote("nqn.a", "nqn.b")):
		t.Error("a card takes another's names for its own")
	case c.OwnsSubsystem(nqn+"0") || c.OwnsSubsystem(strings.ToUpper(nqn)) || c.OwnsSubsystem(identity.Store{UUID: uuid.Nil}.Subsystem("host1")):
		t.Error("a card takes for its own what it does not make")
	case other.NvmeNamespace(disk, source) == id || c.NvmeNamespace(disk, source+"0") == id || c.NvmeNamespace(disk+"0", source) == id:
		t.Error("two disks have one identity")
	}
	longest := identity.Card{Host: strings.Repeat("h", identity.MaxNodeBytes)}
	if n := len(longest.Subsystem(disk)); n > 223 {
		t.Errorf("an NQN has %d bytes", n)
	}
	if n := len(longest.Remote(nqn, nqn)); n > 63 {
		t.Errorf("a controller's name has %d bytes", n)
	}
}
