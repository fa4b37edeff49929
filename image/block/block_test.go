package block

import (
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/thaw-project/thaw/kind"
)

var spec = Spec{
	Mode: ModeOverlayfs, Filesystem: Erofs, VirtualSize: 100 << 30,
	ChainID: "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae",
}

const config = digest.Digest("sha256:fcde2b2edba56bf408601fb721fe9b5c338d10ee429ea04fae5511b68fbf8fb9")

// TestGolden: these names are in manifests and stores out there. A change of them
// makes every image convert again; change Layout for that, not the derivation.
func TestGolden(t *testing.T) {
	bd := spec
	bd.Mode, bd.Filesystem = ModeOverlaybd, Ext4
	for got, want := range map[string]string{
		spec.GlobalName(): "global-11c9b066-5d03-5432-801c-2d5e9817ee91",
		spec.LocalName("registry.example/team/app"):           "local-cfcfb694-fcb3-5045-b84e-079cca6cd103",
		spec.SoldierName("registry.example/team/app", config): "soldier-455721dc-02bd-578c-b584-e1e671720b2c",
		bd.GlobalName(): "global-1f813680-7d80-52c8-b5e1-b138d9097e5e",
	} {
		if got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

// TestEverythingCounts: names differ when anything a block's content or audience
// depends on does.
func TestEverythingCounts(t *testing.T) {
	names := map[string]string{}
	add := func(what, name string) {
		t.Helper()
		if other, ok := names[name]; ok {
			t.Errorf("%s and %s are both %s", what, other, name)
		}
		names[name] = what
		if scope, err := ParseName(name); err != nil || !strings.HasPrefix(name, string(scope)+"-") {
			t.Errorf("%s: %s: %q %v", what, name, scope, err)
		}
	}
	for _, mode := range []Mode{ModeOverlayfs, ModeOverlaybd} {
		for _, fs := range []Filesystem{Ext4, Erofs} {
			for _, size := range []int64{1 << 30, 2 << 30} {
				for _, chain := range []digest.Digest{spec.ChainID, config} {
					s := Spec{mode, fs, size, chain}
					what := strings.Join([]string{string(mode), string(fs), string(chain)}, " ")
					add("global "+what, s.GlobalName())
					for _, repository := range []string{"", "a/b", "a/c"} {
						add("local "+repository+what, s.LocalName(repository))
						add("soldier "+repository+what, s.SoldierName(repository, config))
						add("other soldier "+repository+what, s.SoldierName(repository, spec.ChainID))
					}
				}
			}
		}
	}
}

func TestParse(t *testing.T) {
	good := spec.GlobalName()
	for _, bad := range []string{
		"", "global-", good + "\n", "\n" + good, good + "x", good[1:], strings.ToUpper(good), "work" + strings.TrimPrefix(good, "global"),
		strings.Replace(good, "-", "_", 1), "global/../" + good, strings.Repeat("global-", 1000),
	} {
		if _, err := ParseName(bad); kind.Of(err) != kind.Invalid {
			t.Errorf("ParseName(%q): %v", bad, err)
		} else if len(err.Error()) > 500 {
			t.Errorf("the error repeats %d bytes of a name", len(err.Error()))
		}
	}
	for _, bad := range []string{"", "overlay", "OVERLAYFS", "xfs"} {
		if _, err := ParseMode(bad); kind.Of(err) != kind.Invalid {
			t.Errorf("ParseMode(%q): %v", bad, err)
		}
		if _, err := ParseFilesystem(bad); kind.Of(err) != kind.Invalid {
			t.Errorf("ParseFilesystem(%q): %v", bad, err)
		}
	}
	for _, m := range []Mode{ModeOverlayfs, ModeOverlaybd} {
		if got, err := ParseMode(string(m)); got != m || err != nil {
			t.Errorf("%q %v", got, err)
		}
	}
	for _, f := range []Filesystem{Ext4, Erofs} {
		if got, err := ParseFilesystem(string(f)); got != f || err != nil {
			t.Errorf("%q %v", got, err)
		}
	}
}
