package dpusim

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/thaw-project/thaw/failpoint"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/opi"
	"github.com/thaw-project/thaw/spdk"
)

const (
	// DefaultFunctions is how many functions a card has unless told otherwise.
	DefaultFunctions = 8
	maxFunctions     = 256

	// unplugPatience is less than what the bridge's callers wait for an answer.
	unplugPatience = 20 * time.Second
	// askAgain is when the host is asked again: it may not have had a driver for its
	// slots yet, or have been booting.
	askAgain = 5 * time.Second
	// waitSlice is how long the monitor is kept to wait for the host.
	waitSlice = time.Second

	// freePatience is how long QEMU may take to let go of a disk whose controller is gone.
	freePatience = 5 * time.Second
	// openSeconds is how long QEMU may try to connect to a socket that was just made. It
	// does nothing else meanwhile.
	openSeconds = 5
	// reconnectSeconds is how long QEMU keeps requests while nobody serves the socket: a
	// target that was killed is a pause. A host waits as long as its own timeouts say.
	reconnectSeconds = 24 * 60 * 60

	// maxSocketPath is what the kernel takes.
	maxSocketPath = 107
)

// Options say what plays the card. Zero fields take the defaults that each names.
type Options struct {
	// QMP is the path of the machine's QMP socket (-qmp unix:PATH,server=on,wait=off).
	QMP string
	// Target is the `thaw target` of the card. Whoever made it closes it.
	Target *spdk.Client
	// Functions is how many root ports rp0, rp1 and so on the machine has; default
	// DefaultFunctions.
	Functions int
	// Dir is where the target makes its NBD sockets, an absolute path. It is made with mode 0700.
	Dir string
	// UnplugPatience is how long the host may take to let go of a function; default 20 s.
	UnplugPatience time.Duration
	Log            *slog.Logger // default: none
}

func (o *Options) fill() error {
	if o.Functions == 0 {
		o.Functions = DefaultFunctions
	}
	if o.UnplugPatience == 0 {
		o.UnplugPatience = unplugPatience
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o.Validate()
}

// Validate says what is wrong with the options.
func (o *Options) Validate() error {
	switch {
	case o.QMP == "" || o.Target == nil:
		return kind.Errorf(kind.Invalid, "dpusim: no QMP socket or no target given")
	case o.Functions < 0 || o.Functions > maxFunctions:
		return kind.Errorf(kind.Invalid, "dpusim: %d functions: there can be %d", o.Functions, maxFunctions)
	case !filepath.IsAbs(o.Dir) || filepath.Clean(o.Dir) != o.Dir || len(o.Dir)+len("/thaw-f255-0123456789abcdef.sock") > maxSocketPath:
		return kind.Errorf(kind.Invalid, "dpusim: folder %.128q for sockets: it must be a short absolute path", o.Dir)
	}
	return nil
}

// Sim is a card's functions, pcie:0:0:0 to pcie:0:N-1:0. It has no state and no
// goroutines; its methods may be called concurrently.
type Sim struct {
	o Options
	// turn is held by who changes something, so that what was read holds. It is not held
	// while the host is waited for.
	turn chan struct{}
}

var _ opi.Functions = (*Sim)(nil)

// New returns the card of a machine. It waits for neither QEMU nor the target.
func New(o Options) (*Sim, error) {
	if err := o.fill(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("dpusim: %w", err)
	}
	return &Sim{o: o, turn: make(chan struct{}, 1)}, nil
}

// name is what a function that shows a subsystem is called: the NVMe device, its block
// node, and the socket's file. QEMU allows 31 bytes for a node.
func name(function int, nqn string) string {
	h := sha256.Sum256([]byte(nqn))
	return fmt.Sprintf("thaw-f%d-%s", function, hex.EncodeToString(h[:8]))
}

var named = regexp.MustCompile(`^thaw-f(0|[1-9][0-9]{0,2})-([0-9a-f]{16})$`)

// functionOf is the inverse of name, but for the NQN.
func functionOf(name string) (int, bool) {
	m := named.FindStringSubmatch(name)
	if m == nil {
		return 0, false
	}
	n, err := strconv.Atoi(m[1])
	return n, err == nil
}

func (s *Sim) socket(name string) string { return filepath.Join(s.o.Dir, name+".sock") }

// part is what there is of a function that shows a subsystem, wholly or in part.
type part struct {
	device bool
	node   bool
	size   int64 // of the node
	export *spdk.NBDExport
}

// read returns all parts by name.
func (s *Sim) read(ctx context.Context, m *monitor) (map[string]*part, error) {
	parts := map[string]*part{}
	at := func(name string) *part {
		if _, ok := functionOf(name); !ok {
			return &part{}
		}
		if parts[name] == nil {
			parts[name] = &part{}
		}
		return parts[name]
	}
	var devices []struct{ Name string }
	if err := m.do("qom-list", map[string]any{"path": "/machine/peripheral"}, &devices); err != nil {
		return nil, refused(err)
	}
	for _, d := range devices {
		at(d.Name).device = true
	}
	var nodes []struct {
		Name  string `json:"node-name"`
		Image struct {
			Size int64 `json:"virtual-size"`
		}
	}
	if err := m.do("query-named-block-nodes", map[string]any{"flat": true}, &nodes); err != nil {
		return nil, refused(err)
	}
	for _, n := range nodes {
		p := at(n.Name)
		p.node, p.size = true, n.Image.Size
	}
	exports, err := s.o.Target.ThawNBDGetExports(ctx)
	if err != nil {
		if errors.Is(err, kind.Unsupported) {
			err = fmt.Errorf("the target is no thaw target, which a simulated card needs: %w", err)
		}
		return nil, err
	}
	for _, e := range exports {
		if dir, file := filepath.Split(e.Socket); filepath.Clean(dir) == s.o.Dir {
			at(strings.TrimSuffix(file, ".sock")).export = &e
		}
	}
	return parts, nil
}

// refused gives what QEMU refuses a kind.
func refused(err error) error {
	var e *qmpError
	if errors.As(err, &e) {
		return kind.Wrap(kind.Unavailable, err)
	}
	return err
}

// with runs f with the turn and a connection.
func (s *Sim) with(ctx context.Context, f func(*monitor) error) error {
	select {
	case s.turn <- struct{}{}:
	case <-ctx.Done():
		return kind.Wrap(kind.Unavailable, fmt.Errorf("dpusim: wait for another operation: %w", ctx.Err()))
	}
	defer func() { <-s.turn }()
	m, err := dial(ctx, s.o.QMP)
	if err != nil {
		return err
	}
	defer m.close()
	return f(m)
}

// index checks that the card has the function.
func (s *Sim) index(f opi.Function) (int, error) {
	if f.Port != 0 || f.Virtual != 0 || int(f.Physical) >= s.o.Functions {
		return 0, kind.Errorf(kind.NotFound, "this card has no function %s: it has pcie:0:0:0 to pcie:0:%d:0", f, s.o.Functions-1)
	}
	return int(f.Physical), nil
}

// Plug implements opi.Functions. What was plugged in part is completed. The subsystem has
// one nvmeNamespace: one function shows one disk. What a subsystem left behind that the target
// knows no more gives way.
func (s *Sim) Plug(ctx context.Context, nqn string, f opi.Function) error {
	function, err := s.index(f)
	if err != nil {
		return err
	}
	all, err := s.o.Target.NvmfGetSubsystems(ctx, "")
	if err != nil {
		return err
	}
	i := slices.IndexFunc(all, func(c spdk.Subsystem) bool { return c.NQN == nqn })
	if i < 0 {
		return kind.Errorf(kind.NotFound, "plug %s: the target has no subsystem %.223q", f, nqn)
	}
	switch n := len(all[i].Namespaces); {
	case n == 0:
		return kind.Errorf(kind.NotFound, "plug %s: subsystem %s has no nvmeNamespace: create it first", f, nqn)
	case n > 1:
		return kind.Errorf(kind.Unsupported, "plug %s: subsystem %s has %d nvmeNamespaces: a function of this card shows one", f, nqn, n)
	}
	bdev, err := s.o.Target.Bdev(ctx, all[i].Namespaces[0].BdevName)
	if err != nil {
		return err
	}
	for {
		left := ""
		err := s.with(ctx, func(m *monitor) error {
			parts, err := s.read(ctx, m)
			if err == nil {
				left, err = others(parts, function, nqn, all)
			}
			if err != nil || left != "" {
				return err
			}
			return s.plug(ctx, m, parts[name(function, nqn)], function, &all[i], bdev)
		})
		if err != nil || left == "" {
			return err
		}
		s.o.Log.Warn("a function shows what the target has no more: it is unplugged", "function", function, "name", left)
		if _, err := s.remove(ctx, left); err != nil {
			return err
		}
	}
}

// others makes sure that a function shows no other subsystem of the target, and returns
// the name of what is left of one that the target does not have.
func others(parts map[string]*part, function int, nqn string, all []spdk.Subsystem) (left string, err error) {
	for n := range parts {
		if i, _ := functionOf(n); i != function || n == name(function, nqn) {
			continue
		}
		for _, other := range all {
			if name(function, other.NQN) == n {
				return "", kind.Errorf(kind.InUse, "function %d shows subsystem %s, not %s", function, other.NQN, nqn)
			}
		}
		left = n
	}
	return left, nil
}

// plug makes what is missing.
func (s *Sim) plug(ctx context.Context, m *monitor, p *part, function int, sub *spdk.Subsystem, bdev *spdk.Bdev) error {
	began := time.Now()
	n := name(function, sub.NQN)
	if p == nil {
		p = &part{}
	}
	if p.device {
		var serial string
		if err := m.do("qom-get", map[string]any{"path": "/machine/peripheral/" + n, "property": "serial"}, &serial); err != nil {
			return refused(err)
		}
		if serial != sub.SerialNumber || p.export != nil && p.export.FailingSize == 0 && p.export.BdevName != bdev.Name {
			return kind.Errorf(kind.InUse, "function %d shows an earlier subsystem %s, with serial number %q: unplug it first", function, sub.NQN, serial)
		}
	}
	whole := p.device && p.node
	if p.node && !p.device {
		// What it was made for may not be what is wanted.
		if err := s.deleteNode(ctx, m, n, p); err != nil {
			return refused(err)
		}
	}
	if p.export != nil && (p.export.BdevName != bdev.Name || p.export.NQN != sub.NQN) {
		if err := s.o.Target.ThawNBDUnexport(ctx, s.socket(n)); err != nil && !errors.Is(err, kind.NotFound) {
			return err
		}
		p.export = nil
	}
	if whole && p.export != nil {
		return nil
	}
	if p.export == nil {
		if err := s.o.Target.ThawNBDExport(ctx, bdev.Name, s.socket(n), sub.NQN); err != nil {
			return err
		}
		failpoint.Reach("dpusim.plug: exported")
	}
	exported := time.Now()
	if !p.node {
		readOnly, err := s.readOnly(ctx, n)
		if err != nil {
			return err
		}
		err = m.do("blockdev-add", map[string]any{
			"driver": "nbd", "node-name": n, "export": "", "server": map[string]any{"type": "unix", "path": s.socket(n)},
			"read-only": readOnly, "discard": "unmap", "reconnect-delay": reconnectSeconds, "open-timeout": openSeconds,
		}, nil)
		if err != nil {
			return refused(err)
		}
		failpoint.Reach("dpusim.plug: block node added")
	}
	opened := time.Now()
	if !p.device {
		err := m.do("device_add", map[string]any{
			"driver": "nvme", "id": n, "serial": sub.SerialNumber, "drive": n, "bus": "rp" + strconv.Itoa(function),
			"logical_block_size": bdev.BlockSizeBytes, "physical_block_size": max(bdev.BlockSizeBytes, 4096),
		}, nil)
		var e *qmpError
		if errors.As(err, &e) {
			err = kind.Wrap(kind.InUse, err)
		}
		if err != nil {
			return fmt.Errorf("plug function %d: %w", function, err)
		}
		failpoint.Reach("dpusim.plug: device added")
	}
	s.o.Log.Info("function plugged", "function", function, "subsystem", sub.NQN, "bdev", bdev.Name,
		"export_took", exported.Sub(began), "block_node_took", opened.Sub(exported), "device_took", time.Since(opened), "qemu_took", m.waited)
	return nil
}

// serve makes sure that the socket of a block node is served. QEMU stands still, and the
// host with it, when it is to close a disk whose server it waits for. Where the disk is
// gone, one on which all fails takes its place.
func (s *Sim) serve(ctx context.Context, n string, p *part) error {
	if p.export != nil || !p.node {
		return nil
	}
	if err := s.o.Target.ThawNBDExportFailing(ctx, s.socket(n), p.size); err != nil {
		return err
	}
	p.export = &spdk.NBDExport{Socket: s.socket(n), FailingSize: p.size}
	failpoint.Reach("dpusim.unplug: stand-in exported")
	return nil
}

// deleteNode deletes a block node without a device.
func (s *Sim) deleteNode(ctx context.Context, m *monitor, n string, p *part) error {
	if err := s.serve(ctx, n, p); err != nil {
		return err
	}
	if err := m.do("blockdev-del", map[string]any{"node-name": n}, nil); err != nil {
		return err
	}
	p.node = false
	return nil
}

// readOnly tells whether what a socket serves cannot be written: then the drive is
// write-protected.
func (s *Sim) readOnly(ctx context.Context, n string) (bool, error) {
	exports, err := s.o.Target.ThawNBDGetExports(ctx)
	if err != nil {
		return false, err
	}
	for _, e := range exports {
		if e.Socket == s.socket(n) {
			return e.ReadOnly, nil
		}
	}
	return false, kind.Errorf(kind.Unavailable, "the target does not serve %s any more", s.socket(n))
}

// Unplug implements opi.Functions. It waits for the host to let go: kind.InUse when it
// does not.
func (s *Sim) Unplug(ctx context.Context, nqn string, f opi.Function) error {
	function, err := s.index(f)
	if err != nil {
		return err
	}
	found, err := s.remove(ctx, name(function, nqn))
	if err == nil && !found {
		err = kind.Errorf(kind.NotFound, "%s does not show %.223q", f, nqn)
	}
	return err
}

// remove removes the parts of a name, the last first, and tells whether there were any.
func (s *Sim) remove(ctx context.Context, n string) (found bool, err error) {
	began, asked := time.Now(), time.Time{}
	for gone := false; !gone; {
		if err := s.with(ctx, func(m *monitor) error {
			parts, err := s.read(ctx, m)
			p := parts[n]
			if err != nil || p == nil {
				gone = true
				return err
			}
			found = true
			if err := s.serve(ctx, n, p); err != nil {
				return err
			}
			if p.device {
				if now := time.Now(); now.Sub(asked) > askAgain {
					asked = now
					// QEMU refuses while an earlier request is under way.
					if err := m.do("device_del", map[string]any{"id": n}, nil); err != nil {
						s.o.Log.Debug("the host is not asked again to let go of a function", "name", n, "err", err)
					}
					failpoint.Reach("dpusim.unplug: asked")
				}
				if !m.deleted(n, waitSlice) && time.Since(began) > s.o.UnplugPatience {
					return kind.Errorf(kind.InUse, "the host does not let go of function %s within %s", n, s.o.UnplugPatience)
				}
				return nil // what there is now, the next connection tells
			}
			failpoint.Reach("dpusim.unplug: device deleted")
			if p.node {
				if err := s.deleteNode(ctx, m, n, p); err != nil {
					var e *qmpError
					if errors.As(err, &e) && time.Since(began) > s.o.UnplugPatience+freePatience {
						err = kind.Wrap(kind.InUse, err)
					} else if errors.As(err, &e) {
						return pause(ctx, 20*time.Millisecond) // the device is still being taken apart
					}
					return err
				}
				failpoint.Reach("dpusim.unplug: block node deleted")
			}
			if p.export != nil {
				if err := s.o.Target.ThawNBDUnexport(ctx, s.socket(n)); err != nil && !errors.Is(err, kind.NotFound) {
					return err
				}
				failpoint.Reach("dpusim.unplug: not exported")
			}
			gone = true
			return nil
		}); err != nil {
			return found, err
		}
	}
	if found {
		s.o.Log.Info("function unplugged", "name", n, "took", time.Since(began))
	}
	return found, nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return kind.Wrap(kind.Unavailable, ctx.Err())
	}
}

// Plugged implements opi.Functions. A function that shows the subsystem in part only,
// because who plugged or unplugged it was killed, is told too: to plug it completes it,
// and to unplug it removes what there is.
func (s *Sim) Plugged(ctx context.Context, nqn string) (list []opi.Function, err error) {
	err = s.with(ctx, func(m *monitor) error {
		parts, err := s.read(ctx, m)
		for n := range parts {
			if i, _ := functionOf(n); n == name(i, nqn) && i < s.o.Functions {
				list = append(list, opi.Function{Physical: uint16(i)})
			}
		}
		return err
	})
	slices.SortFunc(list, func(a, b opi.Function) int { return int(a.Physical) - int(b.Physical) })
	return list, err
}
