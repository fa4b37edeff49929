package backendtest_test

import (
	"net"
	"testing"

	"github.com/google/uuid"
	"go.uber.org/goleak"

	"github.com/thaw-project/thaw/attacher/backend/backendtest"
	"github.com/thaw-project/thaw/attacher/backend/embedded"
	"github.com/thaw-project/thaw/attacher/export"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/nvmf"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const capacity = 256 << 20

// process is what a store's process has.
type process struct {
	backend  embedded.Backend
	exporter *export.NVMe
}

func start(t *testing.T, dir, portal string) *process {
	t.Helper()
	s, err := lvol.Open(lvol.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	b := embedded.Backend{Store: s}
	x, err := export.New(export.Options{
		Store: s.Stat().UUID, Portals: []string{portal}, Target: nvmf.Options{},
		Open: func(name string, readOnly bool) (bdev.Device, uuid.UUID, error) {
			d, err := s.OpenLvol(name, readOnly)
			if err != nil {
				return nil, uuid.UUID{}, err
			}
			return d, uuid.MustParse(d.UUID()), nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return &process{b, x}
}

func (p *process) stop(t *testing.T) {
	t.Helper()
	if err := p.exporter.Close(); err != nil {
		t.Error(err)
	}
	if err := p.backend.Close(); err != nil {
		t.Error(err)
	}
}

// TestEmbedded runs the suite over package lvol and what exports it over NVMe/TCP from
// this process.
func TestEmbedded(t *testing.T) {
	backendtest.Run(t, func(t *testing.T) *backendtest.Fixture {
		dir := t.TempDir()
		if err := lvol.Create(lvol.CreateOptions{Dir: dir, CapacityBytes: capacity}); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		portal := l.Addr().String()
		l.Close()
		p := start(t, dir, portal)
		t.Cleanup(func() { p.stop(t) })
		f := &backendtest.Fixture{Backend: p.backend, Exporter: p.exporter, UnitBytes: 512, CapacityBytes: capacity}
		f.Restart = func(t *testing.T) {
			p.stop(t)
			p = start(t, dir, portal)
			f.Backend, f.Exporter = p.backend, p.exporter
		}
		return f
	})
}
