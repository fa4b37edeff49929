package annotation

import (
	"maps"
	"reflect"
	"strings"
	"testing"

	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/kind"
)

var ref = LayerRef{
	Block:      "global-3b456ca7-6c79-5405-91b8-a93b38521cbb",
	Leaf:       "soldier-9e762855-72b8-505a-b08e-efa7cafc8d29",
	Mode:       block.ModeOverlaybd,
	Filesystem: block.Ext4,
	Index:      3,
	Count:      12,
	Target:     "rack-7.example",
}

// TestGolden: these annotations are in registries, for nodes of other versions.
func TestGolden(t *testing.T) {
	want := map[string]string{
		"containerd.io/snapshot/thaw.version":    "1",
		"containerd.io/snapshot/thaw.block":      "global-3b456ca7-6c79-5405-91b8-a93b38521cbb",
		"containerd.io/snapshot/thaw.leaf":       "soldier-9e762855-72b8-505a-b08e-efa7cafc8d29",
		"containerd.io/snapshot/thaw.mode":       "overlaybd",
		"containerd.io/snapshot/thaw.filesystem": "ext4",
		"containerd.io/snapshot/thaw.layer":      "3/12",
		"containerd.io/snapshot/thaw.target":     "rack-7.example",
	}
	if got := ref.Annotations(); !reflect.DeepEqual(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	for k, v := range want {
		// containerd's bound on a label.
		if len(k)+len(v) >= 4096 {
			t.Errorf("%s is too long", k)
		}
	}
	want["containerd.io/snapshot/cri.image-ref"] = "others' labels do not matter"
	want["x"] = "y"
	if got, ok, err := Parse(want); got != ref || !ok || err != nil {
		t.Errorf("%+v %v %v", got, ok, err)
	}
}

func TestNotOurs(t *testing.T) {
	for _, labels := range []map[string]string{nil, {}, {"containerd.io/snapshot/other": "x", "containerd.io/snapshot/thawed": "y"}} {
		if _, ok, err := Parse(labels); ok || err != nil {
			t.Errorf("%v: %v %v", labels, ok, err)
		}
	}
}

func TestHostile(t *testing.T) {
	with := func(key, value string) map[string]string {
		m := maps.Clone(ref.Annotations())
		m[key] = value
		return m
	}
	without := func(key string) map[string]string {
		m := maps.Clone(ref.Annotations())
		delete(m, key)
		return m
	}
	long := strings.Repeat("x", 1<<16)
	for _, c := range []struct {
		labels map[string]string
		kind   kind.Kind
	}{
		{with(Version, "2"), kind.Unsupported},
		{with(Version, "0"), kind.Invalid},
		{with(Version, "-1"), kind.Invalid},
		{with(Version, "1 "), kind.Invalid},
		{with(Version, "99999999999999999999999"), kind.Invalid},
		{with(Prefix+"future", "x"), kind.Unsupported},
		{with(Prefix+long, "x"), kind.Unsupported},
		{with(Block, "soldier"), kind.Invalid},
		{with(Block, "../../etc/passwd"), kind.Invalid},
		{with(Block, long), kind.Invalid},
		{with(Leaf, ref.Block), kind.Invalid},
		{with(Mode, "overlay"), kind.Invalid},
		{with(Filesystem, "xfs"), kind.Invalid},
		{with(Target, "../x"), kind.Invalid},
		{with(Target, "A"), kind.Invalid},
		{with(Target, strings.Repeat("a", 65)), kind.Invalid},
		{with(Layer, "12/12"), kind.Invalid},
		{with(Layer, "-1/12"), kind.Invalid},
		{with(Layer, "0/0"), kind.Invalid},
		{with(Layer, "0/4097"), kind.Invalid},
		{with(Layer, "0"), kind.Invalid},
		{with(Layer, "0/1/2"), kind.Invalid},
		{with(Layer, "9223372036854775808/9223372036854775809"), kind.Invalid},
		{without(Version), kind.Invalid},
		{without(Block), kind.Invalid},
		{without(Leaf), kind.Invalid},
		{without(Mode), kind.Invalid},
		{without(Filesystem), kind.Invalid},
		{without(Layer), kind.Invalid},
		{without(Target), kind.Invalid},
	} {
		_, ok, err := Parse(c.labels)
		if !ok || kind.Of(err) != c.kind {
			t.Errorf("%.300v: %v %v of kind %q, want %q", c.labels, ok, err, kind.Of(err), c.kind)
		}
		if err != nil && len(err.Error()) > 1000 {
			t.Errorf("an error repeats %d bytes of a registry's", len(err.Error()))
		}
	}
}

// FuzzParse: what parses is within bounds and says the same when written again.
func FuzzParse(f *testing.F) {
	a := ref.Annotations()
	f.Add(a[Version], a[Block], a[Leaf], a[Mode], a[Filesystem], a[Layer], a[Target], "", "")
	f.Add("2", "", "", "", "", "0/0", "..", Prefix+"x", "y")
	f.Add("01", a[Block], a[Leaf], "overlayfs", "erofs", "+0/01", "-", "containerd.io/snapshot/x", "y")
	f.Fuzz(func(t *testing.T, version, blk, leaf, mode, fs, layer, target, key, value string) {
		labels := map[string]string{Version: version, Block: blk, Leaf: leaf, Mode: mode, Filesystem: fs, Layer: layer, Target: target}
		labels[key] = value
		r, ok, err := Parse(labels)
		if !ok {
			t.Fatal("annotations of ours were not noticed")
		}
		if err != nil {
			if r != (LayerRef{}) || kind.Of(err) == "" {
				t.Fatalf("%+v beside error %v of kind %q", r, err, kind.Of(err))
			}
			return
		}
		if _, err := block.ParseName(r.Block); err != nil || r.Index < 0 || r.Index >= r.Count || r.Count > MaxLayers || len(r.Target) > 64 {
			t.Fatalf("out of bounds: %+v", r)
		}
		if scope, err := block.ParseName(r.Leaf); err != nil || scope != block.Soldier {
			t.Fatalf("leaf: %+v", r)
		}
		again, ok, err := Parse(r.Annotations())
		if again != r || !ok || err != nil {
			t.Fatalf("%+v became %+v (%v)", r, again, err)
		}
	})
}
