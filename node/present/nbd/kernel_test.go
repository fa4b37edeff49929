package nbd

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/thaw-project/thaw/nbd/kernel"
)

// TestKernel looks at what the presenter makes of the real kernel: the device's
// properties, STATUS, LINK_DEAD, devices of others, and a device that somebody
// disconnects.
func TestKernel(t *testing.T) {
	needKernel(t)
	ctx, cancel := context.WithCancel(context.Background())
	dead := make(chan uint32, 16)
	listener := make(chan error, 1)
	go func() {
		listener <- kernel.LinkDead(ctx, func(index uint32) {
			select {
			case dead <- index:
			default:
			}
		})
	}()
	defer func() {
		cancel()
		if err := <-listener; err != nil {
			t.Errorf("LINK_DEAD: %v", err)
		}
	}()

	state := filepath.Join(t.TempDir(), "nbd.json")
	p := start(t, nil, state, func(o *Options) { o.driver, o.RequestTimeout = nil, time.Second })
	ro, _ := image(t, "ro", 1<<20)
	rw, _ := image(t, "rw", 1<<20)
	d, err := p.Present(ctx, "ro", ro, true)
	if err != nil {
		t.Fatal(err)
	}
	w, err := p.Present(ctx, "rw", rw, false)
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]map[string]string{
		d.Path: {"size": "2048", "ro": "1", "queue/logical_block_size": "512", "backend": p.backend("ro")},
		w.Path: {"size": "2048", "ro": "0", "queue/logical_block_size": "512", "backend": p.backend("rw"), "queue/discard_max_bytes": "+", "queue/write_cache": "write back", "queue/fua": "1"},
	} {
		for name, value := range want {
			raw, err := os.ReadFile("/sys/block/" + filepath.Base(path) + "/" + name)
			got := string(raw)
			if err != nil || got != value+"\n" && (value != "+" || got == "0\n") {
				t.Errorf("%s %s is %q, %v; want %q", path, name, got, err, value)
			}
		}
	}
	list, err := kernel.List()
	connected := 0
	for _, s := range list {
		if s.Connected {
			connected++
		}
	}
	if err != nil || connected != 2 {
		t.Errorf("status: %+v, %v", list, err)
	}

	// A presenter that stops without withdrawing leaves devices whose connections die.
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case index := <-dead:
		t.Logf("nbd%d lost a connection", index)
	case <-time.After(time.Minute):
		t.Error("no LINK_DEAD")
	}

	// A presenter of another state file has nothing to do with them.
	other := start(t, nil, filepath.Join(t.TempDir(), "nbd.json"), func(o *Options) { o.driver = nil })
	if err := other.Teardown(ctx); err != nil {
		t.Error(err)
	}
	var index uint32
	if _, err := fmt.Sscanf(d.Path, "/dev/nbd%d", &index); err != nil {
		t.Fatal(err)
	}
	if seen, err := kernel.Look(sysfs, index); err != nil || seen.Backend != p.backend("ro") {
		t.Errorf("after another presenter's teardown: %+v, %v", seen, err)
	}
	// Reconfiguring under another name is refused.
	if err := kernel.Reconfigure(index, kernel.Config{Sockets: []int{0}, Backend: "another"}); err == nil {
		t.Error("the kernel gives a device to whoever asks")
	}

	// One of the disks loses its record, as if we had been killed while it was made:
	// it goes. The other is taken over.
	p = start(t, nil, state, func(o *Options) { o.driver, o.RequestTimeout = nil, time.Second })
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p.disks = map[string]*disk{"rw": p.disks["rw"]}
	if err := p.save(); err != nil {
		t.Fatal(err)
	}
	p = start(t, nil, state, func(o *Options) { o.driver, o.RequestTimeout = nil, time.Second })
	if seen, err := kernel.Look(sysfs, index); err == nil && seen.Connected {
		t.Errorf("an incomplete device is left: %+v", seen)
	}
	// Somebody disconnects the other one: it is shown anew.
	if err := kernel.Disconnect(p.disks["rw"].Index); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); !p.get("rw").lost.Load(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("nobody noticed that the device is gone")
		}
	}
	again, err := p.Present(ctx, "rw", rw, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s is now %s", w.Path, again.Path)
	if err := p.Teardown(ctx); err != nil {
		t.Error(err)
	}
}
