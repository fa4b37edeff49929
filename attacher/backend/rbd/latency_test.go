//go:build ceph

package rbd_test

import (
	"testing"
	"time"
)

func TestLatency(t *testing.T) {
	b := open(t, options(t))
	defer b.Close()
	for i := 0; i < 3; i++ {
		step := time.Now()
		lap := func(what string, err error) {
			if err != nil {
				t.Fatal(what, err)
			}
			t.Logf("%-12s %v", what, time.Since(step).Round(100*time.Microsecond))
			step = time.Now()
		}
		_, err := b.Create("a", 64<<20)
		lap("create", err)
		d, err := b.OpenLvol("a", false)
		lap("open", err)
		_, err = d.WriteAt(make([]byte, 4096), 0)
		lap("write 1", err)
		_, err = d.WriteAt(make([]byte, 4096), 0)
		lap("write 2", err)
		lap("close", d.Close())
		_, err = b.Snapshot("a", "s")
		lap("snapshot", err)
		_, err = b.Clone("s", "c")
		lap("clone", err)
		lap("delete a", b.Delete("a"))
		_, err = b.SetReadOnly("c", true)
		lap("read-only", err)
		_, err = b.Get("c")
		lap("get", err)
		d, err = b.OpenLvol("c", true)
		lap("open", err)
		_, err = d.ReadAt(make([]byte, 4096), 0)
		lap("read 1", err)
		_, err = d.ReadAt(make([]byte, 4096), 0)
		lap("read 2", err)
		lap("close", d.Close())
		lap("delete c", b.Delete("c"))
		lap("delete s", b.Delete("s"))
	}
}
