package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/e2e/guest/wire"
	"github.com/thaw-project/thaw/filelock"
	"github.com/thaw-project/thaw/kind"
)

// What the guest's kernel and nvme-cli use as their own name (/etc/nvme).
const (
	HostID  = "00000000-0000-4000-8000-0000000000aa"
	HostNQN = "nqn.2014-08.org.nvmexpress:uuid:" + HostID
)

// HostAddress is how the guest reaches what listens on this machine's 127.0.0.1.
const HostAddress = "10.0.2.2"

// bootTimeout is how long a guest may take until it runs commands: some 10 times what
// it takes on an idle machine.
const bootTimeout = 2 * time.Minute

// Options say how a guest is made. The zero value is a guest with nothing extra.
type Options struct {
	MemoryMB int               // default 1024
	CPUs     int               // default 1; more are emulated in turns by one thread and gain no speed, but queues
	Modules  []string          // kernel modules to load
	Files    map[string]string // name to path of a file or folder of this machine: shown at /host/NAME, read-only
	// ScratchMB makes /scratch, an ext4 on a disk of that size, which takes space only
	// as it is filled. The root is a tmpfs, which cannot carry every file: the kernel
	// mounts no EROFS from a file on it.
	ScratchMB int
	Disks     []Disk    // shown as /dev/disk/NAME
	Forward   []int     // TCP ports of the guest that this machine reaches: see Guest.Address
	Append    string    // added to the kernel's command line
	Args      []string  // added to QEMU's arguments
	Cache     string    // folder of the image; default out/cache/guest of the module
	Log       io.Writer // a line per step that takes long; default none
}

// Disk is a file or block device of this machine that the guest has as a disk.
type Disk struct {
	Name     string // at most 20 bytes, which is what a virtio disk's serial number holds
	Path     string
	ReadOnly bool
}

func (o *Options) ensureDefaults() error {
	if o.MemoryMB == 0 {
		o.MemoryMB = 1024
	}
	if o.CPUs == 0 {
		o.CPUs = 1
	}
	if o.Log == nil {
		o.Log = io.Discard
	}
	if o.Cache == "" {
		root, err := moduleRoot()
		if err != nil {
			return err
		}
		o.Cache = filepath.Join(root, "out/cache/guest")
	}
	for _, d := range o.Disks {
		if d.Name == "" || len(d.Name) > 20 || d.Name == "root" || d.Name == "host" || d.Name == "scratch" {
			return kind.Errorf(kind.Invalid, "guest disk of %s: name %q is taken, empty or longer than 20 bytes", d.Path, d.Name)
		}
	}
	return nil
}

// moduleRoot finds the source tree that the running test belongs to.
func moduleRoot() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("find module: %w", err)
	}
	root := filepath.Dir(string(bytes.TrimSpace(out)))
	if root == "/dev" || root == "." {
		return "", errors.New("not inside the source tree")
	}
	return root, nil
}

// Guest is a running virtual machine. Its methods are safe for concurrent use.
type Guest struct {
	options Options
	dir     string // temporary, of this guest
	lock    *os.File
	port    net.Conn
	wire    *wire.Conn
	address map[int]string
	hello   chan struct{} // closed when the agent is ready
	ended   chan struct{} // closed when QEMU has ended
	stop    context.CancelFunc
	owned   sync.WaitGroup // QEMU's waiter and the reader
	closing sync.Once

	mu        sync.Mutex
	processes map[uint32]*Process // guarded by mu; nil when no more can be started
	nextID    uint32              // guarded by mu
}

// Start boots a guest and returns when it runs commands. It waits while another guest
// runs on this machine, whose processors are too few for two, until ctx ends. Close it
// when done; it also ends when this process does.
func Start(ctx context.Context, o Options) (_ *Guest, err error) {
	if err := o.ensureDefaults(); err != nil {
		return nil, err
	}
	image, err := BuildImage(ctx, o.Cache)
	if err != nil {
		return nil, err
	}
	lock, err := takeTurn(ctx, o.Log)
	if err != nil {
		return nil, err
	}
	g := &Guest{
		options: o, lock: lock, address: map[int]string{}, processes: map[uint32]*Process{},
		hello: make(chan struct{}), ended: make(chan struct{}),
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, g.Close())
		}
	}()
	if g.dir, err = makeDir(); err != nil {
		return nil, err
	}
	args, err := g.arguments(ctx, image)
	if err != nil {
		return nil, err
	}
	if err := g.launch(args); err != nil {
		return nil, err
	}
	timer := time.NewTimer(bootTimeout)
	defer timer.Stop()
	select {
	case <-g.hello:
		return g, nil
	case <-g.ended:
		return nil, g.gone()
	case <-timer.C:
		return nil, kind.Errorf(kind.Unavailable, "guest did not come up in %s; its console ends with:\n%s", bootTimeout, g.Console())
	case <-ctx.Done():
		return nil, fmt.Errorf("start guest: %w; its console ends with:\n%s", ctx.Err(), g.Console())
	}
}

// takeTurn waits until no other guest runs. Who holds the lock is told in its file.
func takeTurn(ctx context.Context, log io.Writer) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(os.TempDir(), "thaw-guest.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := filelock.Exclusive(f, filelock.Patience); errors.Is(err, kind.InUse) {
		holder := make([]byte, 200)
		n, _ := f.ReadAt(holder, 0) // at its end, if not before
		holder = holder[:n]
		fmt.Fprintf(log, "waits for the guest of %s\n", holder)
		if err := wait(ctx, f); err != nil {
			return nil, errors.Join(fmt.Errorf("wait for the guest of %s: %w", holder, err), f.Close())
		}
	} else if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	me := fmt.Sprintf("process %d, %s", os.Getpid(), filepath.Base(os.Args[0]))
	_, err = f.WriteAt([]byte(me), 0)
	return f, errors.Join(err, f.Truncate(int64(len(me))))
}

// wait takes the lock of f when it becomes free.
func wait(ctx context.Context, f *os.File) error {
	for {
		err := filelock.Exclusive(f, 100*time.Millisecond)
		if !errors.Is(err, kind.InUse) {
			return err
		}
		if ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
	}
}

// makeDir makes the folder of the one guest there is, and removes what those left
// behind whose process was killed.
func makeDir() (string, error) {
	const name = "thaw-vm-"
	left, err := filepath.Glob(filepath.Join(os.TempDir(), name+"*"))
	if err != nil {
		return "", err
	}
	for _, d := range left {
		if err := os.RemoveAll(d); err != nil {
			return "", err
		}
	}
	return os.MkdirTemp("", name)
}

// arguments makes the files of this guest and returns how to start QEMU.
func (g *Guest) arguments(ctx context.Context, image Image) ([]string, error) {
	o := &g.options
	initrd := filepath.Join(g.dir, "initrd")
	if err := writeInitrd(ctx, g.dir, image.Initrd, initrd); err != nil {
		return nil, err
	}
	net := "user,id=net0"
	for _, p := range o.Forward {
		address, err := freeAddress()
		if err != nil {
			return nil, err
		}
		g.address[p] = address
		net += fmt.Sprintf(",hostfwd=tcp:%s-:%d", address, p)
	}
	line := "console=ttyS0 quiet panic=-1 oops=panic mitigations=off nowatchdog rcupdate.rcu_cpu_stall_suppress=1 random.trust_cpu=on"
	if len(o.Modules) > 0 {
		line += " guest.modules=" + joined(o.Modules)
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35,usb=off,vmport=off,hpet=off", "-cpu", "max", "-m", strconv.Itoa(o.MemoryMB),
		// One thread emulates all processors: with one each, guests have been seen to oops.
		"-accel", "tcg,thread=single,tb-size=512", "-smp", strconv.Itoa(o.CPUs),
		"-kernel", image.Kernel, "-initrd", initrd, "-append", line + " " + o.Append,
		"-serial", "file:" + g.consolePath(),
		"-netdev", net, "-device", "virtio-net-pci,netdev=net0,romfile=",
		"-device", "virtio-rng-pci",
		"-chardev", "socket,id=agent,fd=3", // ExtraFiles[0]
		"-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=agent",
	}
	disks := append([]Disk{{Name: "root", Path: image.Root, ReadOnly: true}}, o.Disks...)
	if len(o.Files) > 0 {
		d, err := g.filesDisk(ctx)
		if err != nil {
			return nil, err
		}
		disks = append(disks, d)
	}
	if o.ScratchMB > 0 {
		d, err := g.scratchDisk(ctx)
		if err != nil {
			return nil, err
		}
		disks = append(disks, d)
	}
	for _, d := range disks {
		// Nothing of a guest outlives it, so its flushes need not reach the disk.
		args = append(args, "-drive", fmt.Sprintf("if=none,id=%s,file=%s,format=raw,cache=unsafe,readonly=%s", d.Name, d.Path, onOff(d.ReadOnly)),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=%s,serial=%s", d.Name, d.Name))
	}
	return append(args, o.Args...), nil
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

func joined(words []string) string {
	var b bytes.Buffer
	for i, w := range words {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(w)
	}
	return b.String()
}

// freeAddress returns an address of this machine that nobody listens on now.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// writeInitrd writes the image's initrd with the agent, built from the source of now.
func writeInitrd(ctx context.Context, dir, base, to string) error {
	program := filepath.Join(dir, "agent")
	c := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, "github.com/thaw-project/thaw/e2e/guest/agent")
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("build the guest's agent: %w:\n%s", err, out)
	}
	content, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	var a cpio
	a.file("init", 0o755, content)
	modules, err := os.ReadFile(base)
	if err != nil {
		return err
	}
	return os.WriteFile(to, append(modules, a.end()...), 0o600)
}

// filesDisk makes the disk behind /host.
func (g *Guest) filesDisk(ctx context.Context) (Disk, error) {
	stage := filepath.Join(g.dir, "host")
	for name, path := range g.options.Files {
		to := filepath.Join(stage, name)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return Disk{}, err
		}
		if err := command(ctx, "cp", "-aLT", "--reflink=auto", path, to); err != nil {
			return Disk{}, err
		}
	}
	image := filepath.Join(g.dir, "host.erofs")
	if err := command(ctx, "mkfs.erofs", "--quiet", "-x-1", image, stage); err != nil {
		return Disk{}, err
	}
	return Disk{Name: "host", Path: image, ReadOnly: true}, os.RemoveAll(stage)
}

func (g *Guest) scratchDisk(ctx context.Context) (Disk, error) {
	path := filepath.Join(g.dir, "scratch")
	f, err := os.Create(path)
	if err != nil {
		return Disk{}, err
	}
	if err := errors.Join(f.Truncate(int64(g.options.ScratchMB)<<20), f.Close()); err != nil {
		return Disk{}, err
	}
	return Disk{Name: "scratch", Path: path}, command(ctx, "mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1", path)
}

// launch starts QEMU and the goroutines that belong to it.
func (g *Guest) launch(args []string) error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	theirs := os.NewFile(uintptr(pair[1]), "agent port")
	defer theirs.Close()
	ours := os.NewFile(uintptr(pair[0]), "agent port")
	defer ours.Close() // FileConn has a copy
	if g.port, err = net.FileConn(ours); err != nil {
		return err
	}
	g.wire = wire.New(g.port)

	ctx, cancel := context.WithCancel(context.Background())
	g.stop = cancel
	c := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	c.ExtraFiles = []*os.File{theirs}
	log, err := os.Create(g.qemuLogPath())
	if err != nil {
		return err
	}
	defer log.Close()
	c.Stdout, c.Stderr = log, log
	// An own process group: Ctrl-C at the terminal is for the test, which ends the guest.
	c.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL, Setpgid: true}
	started := make(chan error, 1)
	g.owned.Add(1)
	go func() { // ends with QEMU, which Close ends
		defer g.owned.Done()
		defer close(g.ended)
		// The signal of Pdeathsig comes when this thread ends, not the process.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := c.Start()
		started <- err
		if err == nil {
			_ = c.Wait() // how it ended is told by its log and console
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start QEMU (tools/install-deps guest installs it): %w", err)
	}
	g.owned.Add(1)
	go func() { // ends when QEMU does: its end of the port closes
		defer g.owned.Done()
		g.read()
	}()
	return nil
}

func (g *Guest) consolePath() string { return filepath.Join(g.dir, "console") }
func (g *Guest) qemuLogPath() string { return filepath.Join(g.dir, "qemu.log") }

// consoleTailBytes is how much of the console goes into messages: an oops with its
// trace.
const consoleTailBytes = 6 << 10

// Console returns the end of what the guest's kernel printed, and what QEMU did.
func (g *Guest) Console() string {
	console, _ := os.ReadFile(g.consolePath()) // may not be there yet
	log, _ := os.ReadFile(g.qemuLogPath())
	console = bytes.ReplaceAll(console, []byte("\r"), nil)
	return string(append(log, console[max(0, len(console)-consoleTailBytes):]...))
}

// Address returns where this machine reaches a port of the guest that Options.Forward
// names.
func (g *Guest) Address(port int) string { return g.address[port] }

// gone is the error for a guest that ended without being asked to.
func (g *Guest) gone() error {
	return kind.Errorf(kind.Unavailable, "the guest ended by itself; its console ends with:\n%s", g.Console())
}

// Close ends the guest and removes its files. It may be called again.
func (g *Guest) Close() (err error) {
	g.closing.Do(func() {
		if g.stop != nil {
			g.stop()
			g.owned.Wait()
		}
		if g.port != nil {
			err = errors.Join(err, g.port.Close())
		}
		if g.dir != "" {
			err = errors.Join(err, os.RemoveAll(g.dir))
		}
		// Last: the next guest's Start removes what it finds.
		err = errors.Join(err, g.lock.Close())
	})
	return err
}
