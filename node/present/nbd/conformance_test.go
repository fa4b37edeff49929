package nbd

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nbd/kernel"
	"github.com/thaw-project/thaw/node/present/presenttest"
)

// subject is the presenter on the real kernel. RequestTimeout is the least there is: it
// is how long users wait after a kill.
var subject = presenttest.Subject{
	Serve: func(dir string) (presenttest.Served, error) {
		return New(context.Background(), Options{
			StatePath: filepath.Join(dir, "nbd.json"), Open: presenttest.OpenFile, RequestTimeout: time.Second,
			Connections: 3, Logger: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
		})
	},
	Left: func(t testing.TB, _ string) {
		devices, err := kernel.Devices(sysfs)
		for _, d := range devices {
			if d.Connected && strings.HasPrefix(d.Backend, "thaw-") {
				t.Errorf("device left: %+v", d)
			}
		}
		if err != nil {
			t.Error(err)
		}
	},
	Abandon: func(string) {
		devices, _ := kernel.Devices(sysfs)
		for _, d := range devices {
			if d.Connected && strings.HasPrefix(d.Backend, "thaw-") {
				kernel.Disconnect(d.Index)
			}
		}
	},
}

func TestMain(m *testing.M) {
	presenttest.Child(subject)
	os.Exit(m.Run())
}

// needKernel skips where the real thing cannot run; presenttest's test runs this test in
// a guest.
func needKernel(t testing.TB) {
	t.Helper()
	if err := Probe(t.Context()); kind.Of(err) == kind.Unsupported || kind.Of(err) == kind.Denied {
		t.Skipf("runs in a guest (make test-vm): %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
}

func TestConformance(t *testing.T) {
	needKernel(t)
	presenttest.Conformance(t, subject)
}

func BenchmarkPresented(b *testing.B) {
	needKernel(b)
	presenttest.Benchmark(b, subject)
}
