package host_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/nvmf"
)

// TestPortals adds and removes paths under load.
func TestPortals(t *testing.T) {
	l := newLab(t, nvmf.Options{})
	id := l.add(nvmf.NvmeNamespaceConfig{Device: newMemory(loadBytes)})
	a, b := newProxy(t, l.addr), newProxy(t, l.addr)
	h := l.connect(quick(a.addr()))
	ld := startLoad(t, l.open(h, id), 8)
	ld.progress(t, 20)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	l.must(h.AddPortal(ctx, b.addr()))
	if err := h.AddPortal(ctx, b.addr()); !errors.Is(err, kind.Exists) {
		t.Errorf("a portal added twice: %v", err)
	}
	if p := h.Portals(); len(p) != 2 || !p[1].Up || p[1].Address != b.addr() || p[1].CNTLID == p[0].CNTLID {
		t.Errorf("portals are %+v", p)
	}
	l.must(h.RemovePortal(a.addr()))
	a.refuse.Store(true)
	a.cut()
	ld.progress(t, 50)
	if p := h.Portals(); len(p) != 1 || p[0].Address != b.addr() {
		t.Errorf("portals are %+v", p)
	}
	if err := h.RemovePortal(b.addr()); !errors.Is(err, kind.InUse) {
		t.Errorf("the last portal: %v", err)
	}
	if err := h.RemovePortal(a.addr()); !errors.Is(err, kind.NotFound) {
		t.Errorf("a portal removed twice: %v", err)
	}
	if err := h.AddPortal(ctx, a.addr()); err == nil {
		t.Error("a portal that refuses was added")
	}
	a.refuse.Store(false)
	l.must(h.AddPortal(ctx, a.addr()))
	l.must(h.RemovePortal(b.addr()))
	ld.progress(t, 50)
	ld.end()
	l.must(h.Close())
	if err := h.AddPortal(ctx, b.addr()); !errors.Is(err, kind.Unavailable) {
		t.Errorf("a portal after Close: %v", err)
	}
}
