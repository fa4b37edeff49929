package doctor

import (
	"context"
	"testing"
)

func TestRelease(t *testing.T) {
	for in, want := range map[string][2]int{
		"6.18.44-fc": {6, 18}, "6.1.0-18-amd64": {6, 1}, "5.15-rc3": {5, 15}, "nonsense": {0, 0}, "": {0, 0},
	} {
		major, minor := release(in)
		if major != want[0] || minor != want[1] {
			t.Errorf("release(%q) = %d.%d, want %d.%d", in, major, minor, want[0], want[1])
		}
	}
}

func TestMissingPartsAreFailuresWithAdvice(t *testing.T) {
	dir := t.TempDir()
	o := Options{Root: dir, Run: dir + "/run", MetricsSockets: map[string]string{"server": dir + "/no.sock"}, ContainerdSocket: dir + "/none.sock", Snapshotter: "thaw"}
	states := map[string]Finding{}
	for _, f := range Examine(context.Background(), o) {
		states[f.Check] = f
		if f.State == Fail && f.Advice == "" && f.Check != "disk" {
			t.Errorf("%s failed without advice: %s", f.Check, f.Detail)
		}
	}
	for _, check := range []string{"thaw server", "containerd"} {
		if states[check].State != Fail {
			t.Errorf("%s: %+v, want fail", check, states[check])
		}
	}
}

func TestMachineThatShowsNoDisksNeedsNoFUSE(t *testing.T) {
	o := Options{Root: t.TempDir(), Run: t.TempDir(), Snapshotter: "thaw"}
	has := func(check string) (found bool) {
		for _, f := range Examine(context.Background(), o) {
			found = found || f.Check == check
		}
		return found
	}
	if has("fuse") {
		t.Error("FUSE is looked for")
	}
	if o.Presentations = map[string]error{}; !has("fuse") {
		t.Error("FUSE is not looked for where disks are shown")
	}
}

func TestExisting(t *testing.T) {
	if got := existing("/proc/self/does/not/exist"); got != "/proc/self" {
		t.Errorf("got %s", got)
	}
	if got := existing("/nope"); got != "/" {
		t.Errorf("got %s", got)
	}
}
