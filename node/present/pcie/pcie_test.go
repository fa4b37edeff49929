package pcie

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"go.uber.org/goleak"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/nvmesys"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	testUUID   = "11111111-2222-4333-8444-55555555555a"
	testSerial = "0123456789abcdef0123"
	testSize   = 1 << 20
	testAddr   = "0000:3b:00.2"
)

// machine is a kernel's sysfs as a tree of files, and what of the kernel changes it.
type machine struct {
	t   *testing.T
	dir string

	mu      sync.Mutex
	watcher func()            // guarded by mu, as all below
	nodes   map[string]string // device nodes, by path
	claims  map[string]bool
	inUse   map[string]bool
	writes  []string
	bind    func(address string) error // what the driver does when it is bound
	deaf    bool                       // events get lost
}

func newMachine(t *testing.T) *machine {
	m := &machine{t: t, dir: t.TempDir(), nodes: map[string]string{}, claims: map[string]bool{}, inUse: map[string]bool{}}
	for _, d := range []string{"block", "class/nvme", "bus/pci/devices", "bus/pci/drivers/nvme"} {
		m.must(os.MkdirAll(filepath.Join(m.dir, d), 0o755))
	}
	return m
}

func (m *machine) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) attributes(dir string, values map[string]string) {
	m.t.Helper()
	m.must(os.MkdirAll(filepath.Join(m.dir, dir), 0o755))
	for name, v := range values {
		m.must(os.WriteFile(filepath.Join(m.dir, dir, name), []byte(v+"\n"), 0o644))
	}
}

// event sends what the kernel would, as bytes.
func (m *machine) event(action, subsystem, name string) {
	raw := fmt.Sprintf("%s@/devices/x\x00ACTION=%s\x00SUBSYSTEM=%s\x00DEVNAME=%s\x00", action, action, subsystem, name)
	e, ok := nvmesys.ParseEvent([]byte(raw))
	if !ok {
		m.t.Errorf("event %q is not understood", raw)
	}
	m.mu.Lock()
	tell := m.watcher
	if m.deaf || !concerns(e) {
		tell = nil
	}
	m.mu.Unlock()
	if tell != nil {
		tell()
	}
}

// function makes a PCI device.
func (m *machine) function(address, class, driver string) {
	uevent := "PCI_CLASS=10802"
	if driver != "" {
		uevent = "DRIVER=" + driver + "\n" + uevent
	}
	m.attributes("bus/pci/devices/"+address, map[string]string{"class": class, "driver_override": "(null)", "uevent": uevent})
	m.event("add", "pci", "")
}

// shown is a drive as sysfs has it.
type shown struct {
	n                        int
	uuid, nguid, wwid        string
	serial, address, ro      string
	sectors                  int64
	multipath, notReady, tcp bool
}

func (s shown) name() string { return fmt.Sprintf("nvme%dn1", s.n) }

// plug makes a drive appear.
func (m *machine) plug(s shown) {
	m.t.Helper()
	ctrl := fmt.Sprintf("class/nvme/nvme%d", s.n)
	transport := "pcie"
	if s.tcp {
		transport = "tcp"
	}
	m.attributes(ctrl, map[string]string{"transport": transport, "address": s.address, "state": "live", "serial": s.serial + "   "})
	values := map[string]string{"dev": fmt.Sprintf("259:%d", s.n), "size": fmt.Sprint(s.sectors), "ro": s.ro, "wwid": s.wwid}
	if s.uuid != "" {
		values["uuid"] = s.uuid
	}
	if s.nguid != "" {
		values["nguid"] = s.nguid
	}
	block := "block/" + s.name()
	device := fmt.Sprintf("../../class/nvme/nvme%d", s.n)
	if s.multipath {
		subsystem := fmt.Sprintf("class/nvme-subsystem/nvme-subsys%d", s.n)
		m.attributes(subsystem, map[string]string{"serial": s.serial})
		m.must(os.Symlink(filepath.Join(m.dir, ctrl), filepath.Join(m.dir, subsystem, fmt.Sprintf("nvme%d", s.n))))
		// The hidden disk of the one path.
		hidden := fmt.Sprintf("block/nvme%dc%dn1", s.n, s.n)
		m.attributes(hidden, values)
		m.must(os.Symlink(device, filepath.Join(m.dir, hidden, "device")))
		device = fmt.Sprintf("../../class/nvme-subsystem/nvme-subsys%d", s.n)
	}
	m.must(os.MkdirAll(filepath.Join(m.dir, block), 0o755))
	m.must(os.Symlink(device, filepath.Join(m.dir, block, "device")))
	m.attributes(block, values)
	if !s.notReady {
		m.node(s)
	}
	m.event("add", "block", s.name())
}

func (m *machine) node(s shown) {
	m.mu.Lock()
	m.nodes["/dev/"+s.name()] = fmt.Sprintf("259:%d", s.n)
	m.mu.Unlock()
	m.event("change", "block", s.name())
}

// unplug makes it vanish.
func (m *machine) unplug(s shown) {
	m.t.Helper()
	m.must(os.RemoveAll(filepath.Join(m.dir, "block", s.name())))
	m.must(os.RemoveAll(filepath.Join(m.dir, "class/nvme", fmt.Sprintf("nvme%d", s.n))))
	m.mu.Lock()
	delete(m.nodes, "/dev/"+s.name())
	m.mu.Unlock()
	m.event("remove", "block", s.name())
}

func (m *machine) Sys() fs.FS { return os.DirFS(m.dir) }

func (m *machine) Load(context.Context) error { return nil }

func (m *machine) Write(_ context.Context, name, data string) error {
	m.mu.Lock()
	m.writes = append(m.writes, name+"="+data)
	bind := m.bind
	m.mu.Unlock()
	setDriver := func(driver string) {
		uevent := "PCI_CLASS=10802"
		if driver != "" {
			uevent = "DRIVER=" + driver + "\n" + uevent
		}
		m.attributes("bus/pci/devices/"+data, map[string]string{"uevent": uevent})
	}
	switch {
	case name == "bus/pci/drivers/nvme/bind":
		if bind != nil {
			if err := bind(data); err != nil {
				return err
			}
		}
		setDriver("nvme")
		m.event("bind", "pci", "")
	case name == "bus/pci/drivers/nvme/unbind":
		setDriver("")
		m.event("unbind", "pci", "")
	case strings.HasSuffix(name, "/driver_override"):
		if data == "\n" {
			data = "(null)"
		}
		m.attributes(filepath.Dir(name), map[string]string{"driver_override": data})
	default:
		return fmt.Errorf("nobody may write %s", name)
	}
	return nil
}

func (m *machine) Node(path, number string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.nodes[path] == number
}

func (m *machine) SetReadOnly(_ context.Context, path string) error {
	m.attributes("block/"+filepath.Base(path), map[string]string{"ro": "1"})
	return nil
}

func (m *machine) Claim(_ context.Context, path string, _ time.Duration) (func() error, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.claims[path] || m.inUse[path] {
		return nil, kind.Errorf(kind.InUse, "%s is in use", path)
	}
	m.claims[path] = true
	return func() error {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.claims, path)
		return nil
	}, nil
}

func (m *machine) Watch(ctx context.Context, ready, changed func()) error {
	m.mu.Lock()
	m.watcher = changed
	m.mu.Unlock()
	ready()
	<-ctx.Done()
	return nil
}

func (m *machine) finder(functions map[string]string) *Finder {
	m.t.Helper()
	f, err := New(Options{Functions: functions, driver: m})
	m.must(err)
	m.t.Cleanup(func() { f.Close() })
	return f
}

func (m *machine) written() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]string(nil), m.writes...)
}

func wanted(readOnly bool) present.Disk {
	return present.Disk{ID: "block-1", SizeBytes: testSize, ReadOnly: readOnly, NVMe: &present.NVMe{UUID: testUUID, Serial: testSerial, Function: "0:1:0"}}
}

func TestFind(t *testing.T) {
	good := shown{n: 3, uuid: testUUID, wwid: "uuid." + testUUID, serial: testSerial, address: testAddr, ro: "1", sectors: testSize / 512}
	for name, c := range map[string]struct {
		change func(*shown)
		write  bool
		kind   kind.Kind // "" when it is found
	}{
		"by UUID":                       {change: func(s *shown) {}},
		"by UUID of wwid":               {change: func(s *shown) { s.uuid = "" }},
		"by NGUID":                      {change: func(s *shown) { s.uuid, s.wwid, s.nguid = "", "", testUUID }},
		"by NGUID of wwid":              {change: func(s *shown) { s.uuid, s.wwid = "", "eui."+strings.ReplaceAll(testUUID, "-", "") }},
		"in upper case":                 {change: func(s *shown) { s.uuid = strings.ToUpper(testUUID) }},
		"by serial number":              {change: func(s *shown) { s.uuid, s.wwid = "", "nvme.1b36-303132-x-00000001" }},
		"by serial number, EUI-64":      {change: func(s *shown) { s.uuid, s.wwid = "", "eui.5254000000000001" }},
		"multipath":                     {change: func(s *shown) { s.multipath = true }},
		"multipath, by serial number":   {change: func(s *shown) { s.multipath, s.uuid, s.wwid = true, "", "nvme.1" }},
		"made read-only":                {change: func(s *shown) { s.ro = "0" }},
		"to write":                      {change: func(s *shown) { s.ro = "0" }, write: true},
		"to write and read-only":        {change: func(s *shown) {}, write: true, kind: kind.ReadOnly},
		"another size":                  {change: func(s *shown) { s.sectors++ }, kind: kind.Corrupt},
		"no size yet":                   {change: func(s *shown) { s.sectors = 0 }, kind: kind.Unavailable},
		"another UUID, same serial":     {change: func(s *shown) { s.uuid = "99999999-2222-4333-8444-55555555555a" }, kind: kind.Unavailable},
		"another serial, no UUID":       {change: func(s *shown) { s.uuid, s.wwid, s.serial = "", "", "x" }, kind: kind.Unavailable},
		"another machine's":             {change: func(s *shown) { s.tcp, s.address = true, "traddr=10.0.0.1" }, kind: kind.Unavailable},
		"at another function's address": {change: func(s *shown) { s.address = "0000:3b:00.3" }, kind: kind.Unavailable},
		"no device node":                {change: func(s *shown) { s.notReady = true }, kind: kind.Unavailable},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.function(testAddr, "0x010802", "nvme")
			f := m.finder(map[string]string{"0:1:0": testAddr})
			s := good
			c.change(&s)
			// A drive that is somebody else's.
			m.plug(shown{n: 0, uuid: "77777777-2222-4333-8444-55555555555a", serial: "other", address: "0000:00:1f.0", ro: "0", sectors: 8})
			m.plug(s)
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			path, err := f.Find(ctx, wanted(!c.write))
			if c.kind == "" {
				if err != nil || path != "/dev/nvme3n1" {
					t.Fatalf("%q, %v", path, err)
				}
				if ro := nvmesys.Attribute(m.Sys(), "block/nvme3n1/ro"); (ro == "1") == c.write {
					t.Errorf("read-only is %s", ro)
				}
			} else if !errors.Is(err, c.kind) {
				t.Fatalf("%q, %v: want %s", path, err, c.kind)
			}
			if len(m.claims) != 0 {
				t.Error("a claim is left")
			}
			if w := m.written(); len(w) != 0 {
				t.Errorf("wrote %q", w)
			}
		})
	}
}

// TestFindWaits has the drive appear in steps, each told by an event, or by none.
func TestFindWaits(t *testing.T) {
	for _, deaf := range []bool{false, true} {
		t.Run(fmt.Sprint("deaf ", deaf), func(t *testing.T) {
			m := newMachine(t)
			f := m.finder(nil)
			m.deaf = deaf
			s := shown{n: 1, uuid: testUUID, serial: testSerial, address: testAddr, ro: "1", sectors: testSize / 512, notReady: true}
			found := make(chan error, 1)
			begin := time.Now()
			go func() {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				_, err := f.Find(ctx, wanted(true))
				found <- err
			}()
			time.Sleep(10 * time.Millisecond) // it may have looked by now, or not
			m.plug(s)
			time.Sleep(10 * time.Millisecond)
			m.node(s)
			if err := <-found; err != nil {
				t.Fatal(err)
			}
			if took := time.Since(begin); !deaf && took >= lookEvery {
				t.Errorf("found after %v: not by the event", took)
			}
			gone := make(chan error, 1)
			go func() {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				gone <- f.Gone(ctx, *wanted(true).NVMe)
			}()
			time.Sleep(10 * time.Millisecond)
			m.unplug(s)
			if err := <-gone; err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			defer cancel()
			if _, err := f.Find(ctx, wanted(true)); !errors.Is(err, kind.Unavailable) || !errors.Is(err, context.DeadlineExceeded) {
				t.Fatal(err)
			}
		})
	}
}

func TestTwoOfOneIdentity(t *testing.T) {
	m := newMachine(t)
	f := m.finder(nil)
	s := shown{n: 1, serial: testSerial, address: testAddr, ro: "1", sectors: testSize / 512}
	m.plug(s)
	s.n, s.address = 2, "0000:3b:00.3"
	m.plug(s)
	if _, err := f.Find(t.Context(), wanted(true)); !errors.Is(err, kind.Corrupt) {
		t.Fatal(err)
	}
	// Known by its function, there is one.
	f = m.finder(map[string]string{"0:1:0": testAddr})
	m.function(testAddr, "0x010802", "nvme")
	if path, err := f.Find(t.Context(), wanted(true)); err != nil || path != "/dev/nvme1n1" {
		t.Fatal(path, err)
	}
}

// TestBind goes through the life of a function that has no driver.
func TestBind(t *testing.T) {
	m := newMachine(t)
	f := m.finder(map[string]string{"0:1:0": testAddr})
	s := shown{n: 1, uuid: testUUID, serial: testSerial, address: testAddr, ro: "1", sectors: testSize / 512}
	attempts := 0
	m.bind = func(string) error {
		if attempts++; attempts == 1 {
			return errors.New("no such device")
		}
		m.plug(s)
		return nil
	}
	found := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		_, err := f.Find(ctx, wanted(true))
		found <- err
	}()
	time.Sleep(5 * time.Millisecond)
	m.function(testAddr, "0x010802", "") // appears while it is waited for
	if err := <-found; err != nil {
		t.Fatal(err)
	}
	dir := "bus/pci/devices/" + testAddr + "/"
	want := []string{dir + "driver_override=nvme", "bus/pci/drivers/nvme/bind=" + testAddr}
	want = append(want, want...) // the first attempt failed
	if got := m.written(); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("wrote %q, want %q", got, want)
	}
	// Used: nothing changes.
	m.writes, m.inUse["/dev/nvme1n1"] = nil, true
	if _, err := f.Leave(t.Context(), *wanted(true).NVMe); !errors.Is(err, kind.InUse) || len(m.written()) != 0 {
		t.Fatal(err, m.written())
	}
	delete(m.inUse, "/dev/nvme1n1")
	// Another process knows as well that the driver was bound by this one.
	f = m.finder(map[string]string{"0:1:0": testAddr})
	release, err := f.Leave(t.Context(), *wanted(true).NVMe)
	if err != nil || !m.claims["/dev/nvme1n1"] {
		t.Fatal(err)
	}
	if got, want := m.written(), []string{"bus/pci/drivers/nvme/unbind=" + testAddr, dir + "driver_override=\n"}; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("wrote %q, want %q", got, want)
	}
	m.unplug(s)
	if err := errors.Join(release(), f.Gone(t.Context(), *wanted(true).NVMe)); err != nil || len(m.claims) != 0 {
		t.Fatal(err)
	}
	// Once more is nothing.
	m.writes = nil
	if release, err = f.Leave(t.Context(), *wanted(true).NVMe); err != nil || release() != nil || len(m.written()) != 0 {
		t.Fatal(err, m.written())
	}
}

// TestOthersStay has functions that are not ours to bind or unbind.
func TestOthersStay(t *testing.T) {
	s := shown{n: 1, uuid: testUUID, serial: testSerial, address: testAddr, ro: "1", sectors: testSize / 512}
	t.Run("bound by the kernel", func(t *testing.T) {
		m := newMachine(t)
		m.function(testAddr, "0x010802", "nvme")
		m.plug(s)
		f := m.finder(map[string]string{"0:1:0": testAddr})
		release, err := f.Leave(t.Context(), *wanted(true).NVMe)
		if err != nil || release() != nil || len(m.written()) != 0 {
			t.Fatal(err, m.written())
		}
	})
	t.Run("another drive by now", func(t *testing.T) {
		m := newMachine(t)
		m.function(testAddr, "0x010802", "nvme")
		m.attributes("bus/pci/devices/"+testAddr, map[string]string{"driver_override": "nvme"})
		other := s
		other.uuid = "99999999-2222-4333-8444-55555555555a"
		m.plug(other)
		f := m.finder(map[string]string{"0:1:0": testAddr})
		release, err := f.Leave(t.Context(), *wanted(true).NVMe)
		if err != nil || release() != nil || len(m.written()) != 0 {
			t.Fatal(err, m.written())
		}
	})
	t.Run("another driver", func(t *testing.T) {
		m := newMachine(t)
		m.function(testAddr, "0x010802", "vfio-pci")
		f := m.finder(map[string]string{"0:1:0": testAddr})
		if _, err := f.Find(t.Context(), wanted(true)); !errors.Is(err, kind.InUse) || !strings.Contains(err.Error(), "vfio-pci") {
			t.Fatal(err)
		}
		if release, err := f.Leave(t.Context(), *wanted(true).NVMe); err != nil || release() != nil || len(m.written()) != 0 {
			t.Fatal(err, m.written())
		}
	})
	t.Run("set aside", func(t *testing.T) {
		m := newMachine(t)
		m.function(testAddr, "0x010802", "")
		m.attributes("bus/pci/devices/"+testAddr, map[string]string{"driver_override": "vfio-pci"})
		f := m.finder(map[string]string{"0:1:0": testAddr})
		if _, err := f.Find(t.Context(), wanted(true)); !errors.Is(err, kind.InUse) || !strings.Contains(err.Error(), "vfio-pci") || len(m.written()) != 0 {
			t.Fatal(err, m.written())
		}
	})
	t.Run("no NVMe", func(t *testing.T) {
		m := newMachine(t)
		m.function(testAddr, "0x020000", "")
		f := m.finder(map[string]string{"0:1:0": testAddr})
		if _, err := f.Find(t.Context(), wanted(true)); !errors.Is(err, kind.Invalid) || len(m.written()) != 0 {
			t.Fatal(err, m.written())
		}
	})
	t.Run("not configured", func(t *testing.T) {
		m := newMachine(t)
		m.function(testAddr, "0x010802", "")
		f := m.finder(map[string]string{"0:2:0": testAddr})
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		if _, err := f.Find(ctx, wanted(true)); !errors.Is(err, kind.Unavailable) || len(m.written()) != 0 {
			t.Fatal(err, m.written())
		}
	})
}

func TestOptionsAreChecked(t *testing.T) {
	for _, bad := range []map[string]string{
		{"0:1": testAddr}, {"0:1:0": "3b:00.2"}, {"0:1:0": "0000:3b:00.2/../x"}, {"0:1:0": testAddr, "0:2:0": testAddr}, {"../0:1:0": testAddr},
	} {
		if _, err := New(Options{Functions: bad}); !errors.Is(err, kind.Invalid) {
			t.Errorf("%v: %v", bad, err)
		}
	}
	m := newMachine(t)
	f := m.finder(nil)
	for _, bad := range []present.NVMe{{}, {UUID: "x"}, {UUID: testUUID, Serial: strings.Repeat("0", 21)}, {UUID: testUUID, Function: "../x"}} {
		if _, err := f.Find(t.Context(), present.Disk{NVMe: &bad}); !errors.Is(err, kind.Invalid) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	if _, err := f.Find(t.Context(), present.Disk{}); !errors.Is(err, kind.Invalid) {
		t.Error(err)
	}
}

// TestConcurrentBind has many find the same drive at once: the driver is bound once.
func TestConcurrentBind(t *testing.T) {
	m := newMachine(t)
	f := m.finder(map[string]string{"0:1:0": testAddr})
	m.function(testAddr, "0x010802", "")
	s := shown{n: 1, uuid: testUUID, serial: testSerial, address: testAddr, ro: "1", sectors: testSize / 512}
	m.bind = func(string) error { m.plug(s); return nil }
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			if _, err := f.Find(ctx, wanted(true)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if w := m.written(); len(w) != 2 {
		t.Errorf("wrote %q", w)
	}
}

// TestThisKernel looks at this machine's own sysfs: whatever is there is no drive of
// ours, and looking changes nothing.
func TestThisKernel(t *testing.T) {
	f, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if path, err := f.Find(ctx, wanted(true)); !errors.Is(err, kind.Unavailable) {
		t.Fatal(path, err)
	}
	if err := f.Gone(t.Context(), *wanted(true).NVMe); err != nil {
		t.Fatal(err)
	}
}

func FuzzDrives(f *testing.F) {
	f.Add("nvme0n1", "8", testUUID, "eui.0123", "0000:3b:00.2", "live")
	f.Fuzz(func(t *testing.T, name, size, id, wwid, address, state string) {
		if !fs.ValidPath(name) || strings.Contains(name, "/") || name == "." {
			return
		}
		sys := fstest.MapFS{}
		for a, v := range map[string]string{"size": size, "uuid": id, "nguid": id, "wwid": wwid, "device/address": address, "device/state": state, "device/transport": "pcie", "device/serial": id} {
			sys["block/"+name+"/"+a] = &fstest.MapFile{Data: []byte(v)}
		}
		list, err := drives(sys)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range list {
			if d.SizeBytes < 0 || !nvmesys.IsDrive(d.Name) || len(d.Addresses) == 0 {
				t.Errorf("%+v", d)
			}
		}
	})
}
