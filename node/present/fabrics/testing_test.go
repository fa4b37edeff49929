package fabrics

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
)

const (
	testSubsystem = "nqn.2014-08.org.thaw-project:target"
	testHost      = "nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-0000000000aa"
	testHostID    = "00000000-0000-4000-8000-0000000000aa"
)

// machine stands in for a kernel and a target where there is no NVMe: controllers come by
// option strings, drives by what is attached, and both show in a sysfs. The real kernel
// is tested in a guest (vm_test.go).
type machine struct {
	mu       sync.Mutex
	changed  []func()                 // guarded by mu: listeners
	ctrls    map[string]controller    // guarded by mu
	drives   map[string]drive         // guarded by mu: by name
	attached map[string]bool          // guarded by mu: blocks that the target shows
	busy     map[string]bool          // guarded by mu
	refuse   map[string]syscall.Errno // guarded by mu: by address
	next     int
	connects []string // guarded by mu: option strings
	deletes  []string // guarded by mu
	unbound  string   // guarded by mu: the module's parameter
	silent   bool     // guarded by mu: no events
	down     bool     // guarded by mu: the attacher does not answer
	portals  []Portal
}

func newMachine() *machine {
	return &machine{
		ctrls: make(map[string]controller), drives: make(map[string]drive), attached: make(map[string]bool), busy: make(map[string]bool), refuse: make(map[string]syscall.Errno),
		portals: []Portal{{TransportTCP, "10.0.0.1", "4420"}}, unbound: "N",
	}
}

func (m *machine) Load(context.Context, string) error { return nil }

func blockUUID(block string) string {
	return uuid.NewSHA1(uuid.NameSpaceOID, []byte(block)).String()
}

const testBytes = 1 << 20

func (m *machine) attach(_ context.Context, target, block string) (Export, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.down:
		return Export{}, kind.Errorf(kind.Unavailable, "target %s is down", target)
	case strings.HasPrefix(block, "missing"):
		return Export{}, kind.Errorf(kind.NotFound, "no block %s", block)
	}
	m.attached[block] = true
	m.settle()
	return Export{Subsystem: testSubsystem, HostNQN: testHost, HostID: testHostID, Portals: m.portals, NSID: 1, UUID: strings.ToUpper(blockUUID(block)), SizeBytes: testBytes}, nil
}

func (m *machine) detach(_ context.Context, target, block string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.down {
		return kind.Errorf(kind.Unavailable, "target %s is down", target)
	}
	delete(m.attached, block)
	m.settle()
	return nil
}

// settle makes the drives what controllers and attachments ask for; mu is held.
func (m *machine) settle() {
	live := false
	for _, c := range m.ctrls {
		live = live || c.State == "live" && c.of(testSubsystem, testHost)
	}
	for name, d := range m.drives {
		there := false
		for b := range m.attached {
			there = there || blockUUID(b) == d.UUID
		}
		if !there || !live {
			delete(m.drives, name)
		}
	}
	for b := range m.attached {
		there := false
		for _, d := range m.drives {
			there = there || blockUUID(b) == d.UUID
		}
		if live && !there {
			name := fmt.Sprintf("nvme0n%d", m.next)
			m.next++
			m.drives[name] = drive{Name: name, UUID: blockUUID(b), Subsystem: testSubsystem, SizeBytes: testBytes}
		}
	}
	if !m.silent {
		for _, f := range m.changed {
			go f()
		}
	}
}

func (m *machine) Sys() fs.FS {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := fstest.MapFS{"block/nvme7n1/size": {Data: []byte("8\n")}}
	put := func(name, value string) { f[name] = &fstest.MapFile{Data: []byte(value + "\n")} }
	put(unboundSending, m.unbound)
	for _, c := range m.ctrls {
		dir := "class/nvme/" + c.Name + "/"
		put(dir+"subsysnqn", c.Subsystem)
		put(dir+"hostnqn", c.HostNQN)
		put(dir+"transport", c.Transport)
		put(dir+"address", "traddr="+c.Address+",trsvcid="+c.Service+",src_addr=10.0.0.9")
		put(dir+"state", c.State)
	}
	for _, d := range m.drives {
		dir := "block/" + d.Name + "/"
		put(dir+"size", fmt.Sprint(d.SizeBytes/512))
		put(dir+"wwid", "uuid."+d.UUID)
		put(dir+"device/subsysnqn", d.Subsystem)
		ro := "0"
		if d.ReadOnly {
			ro = "1"
		}
		put(dir+"ro", ro)
	}
	return f
}

func (m *machine) Connect(_ context.Context, options string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if strings.Contains(options, "transport=tcp") && m.unbound != "Y" {
		return errors.New("connected before the kernel was told to send from threads")
	}
	m.connects = append(m.connects, options)
	o := make(map[string]string)
	for part := range strings.SplitSeq(options, ",") {
		name, value, _ := strings.Cut(part, "=")
		o[name] = value
	}
	if errno := m.refuse[o["traddr"]]; errno != 0 {
		return errno
	}
	for _, c := range m.ctrls {
		if c.of(o["nqn"], o["hostnqn"]) && c.Address == o["traddr"] && c.Service == o["trsvcid"] {
			return syscall.EALREADY
		}
	}
	m.add(controller{Subsystem: o["nqn"], HostNQN: o["hostnqn"], Portal: Portal{o["transport"], o["traddr"], o["trsvcid"]}, State: "live"})
	return nil
}

func (m *machine) add(c controller) {
	c.Name = fmt.Sprintf("nvme%d", m.next)
	m.next++
	m.ctrls[c.Name] = c
	m.settle()
}

func (m *machine) Write(_ context.Context, name, data string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if name == unboundSending {
		m.unbound = data
		return nil
	}
	parts := strings.Split(name, "/")
	if _, ok := m.ctrls[parts[2]]; !ok {
		return syscall.ENOENT
	}
	if parts[3] == "delete_controller" {
		m.deletes = append(m.deletes, parts[2])
		delete(m.ctrls, parts[2])
	}
	m.settle()
	return nil
}

func (m *machine) Claim(_ context.Context, path string, _ time.Duration, readOnly bool) (func() error, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	name := filepath.Base(path)
	d, ok := m.drives[name]
	switch {
	case !ok:
		return nil, kind.Errorf(kind.NotFound, "no %s", path)
	case m.busy[path]:
		return nil, kind.Errorf(kind.InUse, "%s is in use: test", path)
	}
	if readOnly {
		d.ReadOnly = true
		m.drives[name] = d
	}
	m.busy[path] = true
	return func() error { m.setBusy(path, false); return nil }, nil
}

func (m *machine) setBusy(path string, busy bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.busy[path] = busy
}

func (m *machine) Watch(ctx context.Context, ready, changed func()) error {
	m.mu.Lock()
	m.changed = append(m.changed, changed)
	m.mu.Unlock()
	ready()
	<-ctx.Done()
	return nil
}

// lose removes controllers as the end of their loss timeout does.
func (m *machine) lose() {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.ctrls)
	m.settle()
}

func (m *machine) start(t testing.TB, state string) *Presenter {
	t.Helper()
	o := Options{StatePath: state, Attach: m.attach, Detach: m.detach, driver: m}
	if testing.Verbose() {
		o.Logger = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	p, err := New(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func lvol(block string) present.Source {
	return present.Source{Kind: present.SourceLvol, Lvol: block, Target: "store"}
}

func wantKind(t testing.TB, err error, k kind.Kind) {
	t.Helper()
	if kind.Of(err) != k {
		t.Fatalf("got error %v, want kind %q", err, k)
	}
}
