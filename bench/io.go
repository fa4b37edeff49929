package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/thaw-project/thaw/lvol"
)

const (
	// netBytes is the size of the file that all servers serve.
	netBytes = 1 << 30
	// ramBytes is the size of the device in memory: far more than a CPU caches.
	ramBytes = 256 << 20
	// netTime is how long one run counts.
	netTime = 1100 * time.Millisecond
	// netRounds is how often each row is measured.
	netRounds = 3
	// The server has one CPU and the client another, as two machines would.
	serverCPU, clientCPU = "0", "1"
	// startWait bounds how long a server takes to listen.
	startWait = 10 * time.Second
)

// netPattern is a way to use a disk over a connection.
type netPattern struct {
	name       string
	bytes      int
	depth      int
	write      bool
	sequential bool
	time       time.Duration // netTime if 0
}

var netPatterns = []netPattern{
	{name: "randread-4k-qd1", bytes: 4 << 10, depth: 1},
	{name: "randread-4k-qd8", bytes: 4 << 10, depth: 8},
	{name: "randread-4k-qd32", bytes: 4 << 10, depth: 32},
	{name: "randwrite-4k-qd1", bytes: 4 << 10, depth: 1, write: true},
	{name: "randwrite-4k-qd8", bytes: 4 << 10, depth: 8, write: true},
	{name: "randwrite-4k-qd32", bytes: 4 << 10, depth: 32, write: true},
	{name: "read-128k-qd8", bytes: 128 << 10, depth: 8, sequential: true},
	{name: "write-128k-qd8", bytes: 128 << 10, depth: 8, write: true, sequential: true},
}

// enginePatterns are those that compare the engines where the device costs least.
var enginePatterns = []netPattern{netPatterns[2], netPatterns[5]}

func (p netPattern) about() string {
	verb := "reads"
	if p.write {
		verb = "writes"
	}
	order := "random"
	if p.sequential {
		order = "sequential"
	}
	return fmt.Sprintf("%s %s of %d KiB, %d at a time", order, verb, p.bytes>>10, p.depth)
}

// netMetrics are the figures of a run. Those without a client's or server's part are
// absent: nobody can ask another server what it allocated.
var netMetrics = []metric{
	{name: "iops", unit: "IOPS", ratio: true},
	{name: "p50", unit: "us"},
	{name: "p99", unit: "us"},
	{name: "cpu", unit: "CPU s/M", ratio: true}, // of the server
	{name: "cpu-both", unit: "CPU s/M"},         // of server and client
	{name: "switches", unit: "per I/O"},         // context switches of the server
	{name: "allocs", unit: "per I/O"},           // objects that the server allocated
}

// netIO is what the servers serve.
type netIO struct {
	dir  string // on tmpfs
	file string
}

func (b *bench) netFile() (*netIO, error) {
	return b.net.get(func() (_ *netIO, err error) {
		for _, tool := range []string{"fio", "nbdkit", "qemu-nbd", "qemu-img", "taskset"} {
			if _, err := exec.LookPath(tool); err != nil {
				return nil, fmt.Errorf("%w: make deps installs it", err)
			}
		}
		n := &netIO{}
		if n.dir, err = os.MkdirTemp("/dev/shm", "thaw-bench."); err != nil {
			return nil, err
		}
		n.file = filepath.Join(n.dir, "file")
		f, err := os.Create(n.file)
		if err != nil {
			return n, err
		}
		defer f.Close()
		if err := f.Truncate(netBytes); err != nil {
			return n, err
		}
		if err := fillBytes(f, netBytes); err != nil {
			return n, err
		}
		return n, n.makePool()
	})
}

// makePool makes a pool with a filled lvol of ramBytes and its snapshot "image".
func (n *netIO) makePool() (err error) {
	if err := lvol.Create(lvol.CreateOptions{Dir: n.pool(), CapacityBytes: 2 * ramBytes}); err != nil {
		return err
	}
	s, err := lvol.Open(lvol.Options{Dir: n.pool()})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if _, err := s.Create("written", ramBytes); err != nil {
		return err
	}
	l, err := s.OpenLvol("written", false)
	if err != nil {
		return err
	}
	if err := errors.Join(fillBytes(l, ramBytes), l.Close()); err != nil {
		return err
	}
	_, err = s.Snapshot("written", "image")
	return err
}

func (n *netIO) close() error {
	if n == nil {
		return nil
	}
	return os.RemoveAll(n.dir)
}

// subjectKind is one server with the client that it is measured by.
type subjectKind struct {
	name   string
	server func(n *netIO, socket string) []string // command line; the first may be "thaw"
	fio    bool                                   // the client is fio's nbd engine, else our host
	qcow2  bool                                   // it needs a new overlay for each run
}

func ours(name, protocol, engine string, device func(n *netIO) string) subjectKind {
	return subjectKind{name: name, fio: protocol == "nbd", qcow2: strings.HasPrefix(name, "thaw-qcow2"), server: func(n *netIO, socket string) []string {
		return []string{"thaw", "-protocol", protocol, "-engine", engine, "-device", device(n), "-socket", socket}
	}}
}

func lvolDevice(n *netIO) string  { return "lvol:" + n.pool() + ":image" }
func fileDevice(n *netIO) string  { return "file:" + n.file }
func memoryDevice(*netIO) string  { return "memory:" + strconv.Itoa(ramBytes) }
func qcow2Device(n *netIO) string { return "qcow2:" + n.overlay() + ":" + n.file }
func (n *netIO) pool() string     { return filepath.Join(n.dir, "pool") }
func (n *netIO) overlay() string  { return filepath.Join(n.dir, "overlay.qcow2") }

// networked are the comparisons of our targets with each other and with other servers.
// The first subject of each is what the others are compared with.
func (b *bench) networked() (all []comparison) {
	add := func(name, about string, patterns []netPattern, kinds ...subjectKind) {
		for _, p := range patterns {
			c := comparison{name: "io-" + name + "-" + p.name, about: p.about() + "; " + about, rounds: netRounds, metrics: netMetrics}
			for _, k := range kinds {
				c.subjects = append(c.subjects, subject{k.name, func(ctx context.Context) (sample, error) { return b.measure(ctx, k, p) }})
			}
			all = append(all, c)
		}
	}
	idle := ours("shared-nothing", "nvmf", "shared-nothing", memoryDevice)
	all = append(all, comparison{name: "io-idle", about: "our target with a host that was busy and is idle, per second", rounds: netRounds,
		metrics:  []metric{{name: "cpu", unit: "CPU s"}},
		subjects: []subject{{idle.name, func(ctx context.Context) (sample, error) { return b.measureIdle(ctx, idle) }}}})
	add("nvme", "our target by our host over NVMe/TCP, loopback, a file on tmpfs", netPatterns,
		ours("thread-pool", "nvmf", "thread-pool", fileDevice),
		ours("shared-nothing", "nvmf", "shared-nothing", fileDevice))
	add("nbd", "by fio over a Unix socket, a file on tmpfs", netPatterns,
		subjectKind{name: "nbdkit", fio: true, server: func(n *netIO, socket string) []string {
			return []string{"nbdkit", "-f", "-U", socket, "file", n.file}
		}},
		subjectKind{name: "qemu-nbd", fio: true, server: func(n *netIO, socket string) []string {
			return []string{"qemu-nbd", "-f", "raw", "-t", "-k", socket, n.file}
		}},
		ours("thread-pool", "nbd", "thread-pool", fileDevice),
		ours("shared-nothing", "nbd", "shared-nothing", fileDevice))
	add("qcow2", "by fio over a Unix socket, a new qcow2 over a file on tmpfs", netPatterns,
		subjectKind{name: "qemu-nbd", fio: true, qcow2: true, server: func(n *netIO, socket string) []string {
			return []string{"qemu-nbd", "-f", "qcow2", "-t", "-k", socket, n.overlay()}
		}},
		ours("thaw-qcow2", "nbd", "shared-nothing", qcow2Device))
	add("lvol-nvme", "our target by our host over NVMe/TCP, loopback, an immutable lvol on tmpfs", enginePatterns[:1],
		ours("thread-pool", "nvmf", "thread-pool", lvolDevice),
		ours("shared-nothing", "nvmf", "shared-nothing", lvolDevice))
	add("memory-nvme", "our target by our host over NVMe/TCP, loopback, a device in memory", enginePatterns,
		ours("thread-pool", "nvmf", "thread-pool", memoryDevice),
		ours("shared-nothing", "nvmf", "shared-nothing", memoryDevice))
	add("memory-nbd", "our server by fio over a Unix socket, a device in memory", enginePatterns,
		ours("thread-pool", "nbd", "thread-pool", memoryDevice),
		ours("shared-nothing", "nbd", "shared-nothing", memoryDevice))
	return all
}

// measure runs one server and one client once.
func (b *bench) measure(ctx context.Context, k subjectKind, p netPattern) (_ sample, err error) {
	n, err := b.netFile()
	if err != nil {
		return nil, err
	}
	if k.qcow2 {
		os.Remove(n.overlay())
		if out, err := exec.CommandContext(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-b", n.file, "-F", "raw", n.overlay()).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("qemu-img create: %w: %s", err, out)
		}
	}
	tag := strings.NewReplacer("/", "-").Replace(k.name + "." + p.name)
	s, err := b.startServer(ctx, k, n, tag)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	before, err := s.allocations()
	if err != nil {
		return nil, err
	}
	cpuBefore, err := cpuOf(s.pid())
	if err != nil {
		return nil, err
	}
	c, err := b.startClient(ctx, k, p, s.address, tag)
	if err != nil {
		return nil, err
	}
	// Threads, and what is known of them, may end with the connection: what only they
	// know, and what a client uses without its start, is taken in the middle.
	during, err := windowOf(s.pid(), c.command.Process.Pid, netTime+ramp)
	report, failed := c.wait()
	if err := errors.Join(failed, err); err != nil {
		return nil, err
	}
	cpuAfter, err := cpuOf(s.pid())
	if err != nil {
		return nil, err
	}
	after, err := s.allocations()
	if err != nil {
		return nil, err
	}
	cpu := (cpuAfter - cpuBefore) / report.All * 1e6
	v := sample{"iops": report.IOPS, "p50": report.P50, "p99": report.P99, "cpu": cpu}
	if used := during.server.cpuSeconds; used > 0 {
		// How the server's part relates to the rest is the same whatever else runs.
		v["cpu-both"] = cpu * (used + during.client.cpuSeconds) / used
		v["switches"] = during.server.switches / used * cpu / 1e6
	}
	if s.stats != nil {
		v["allocs"] = float64(after-before) / report.All
	}
	return v, nil
}

// measureIdle measures what a target uses for a host that does nothing.
func (b *bench) measureIdle(ctx context.Context, k subjectKind) (_ sample, err error) {
	n, err := b.netFile()
	if err != nil {
		return nil, err
	}
	s, err := b.startServer(ctx, k, n, k.name+".idle")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	const idleTime = 3 * time.Second // it is looked at long after the host was busy
	c, err := b.startClient(ctx, k, netPattern{bytes: 4 << 10, time: idleTime}, s.address, k.name+".idle")
	if err != nil {
		return nil, err
	}
	during, err := windowOf(s.pid(), c.command.Process.Pid, idleTime)
	_, failed := c.wait()
	return sample{"cpu": during.server.cpuSeconds / during.seconds}, errors.Join(failed, err)
}

// server is a server process.
type server struct {
	command *exec.Cmd
	address string
	in      io.WriteCloser // of ours; closing it ends the server
	stats   *json.Decoder  // what ours answers, nil for others
}

func (s *server) pid() int { return s.command.Process.Pid }

func (b *bench) startServer(ctx context.Context, k subjectKind, n *netIO, tag string) (_ *server, err error) {
	socket := filepath.Join(n.dir, "socket")
	os.Remove(socket)
	args := k.server(n, socket)
	own := args[0] == "thaw"
	if own {
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		args = slices.Concat([]string{self, "serve"}, args[1:], b.profile("server."+tag))
	}
	s := &server{address: socket}
	s.command = b.lab.Command(ctx, "taskset", append([]string{"-c", serverCPU}, args...)...)
	var log bytes.Buffer
	s.command.Stderr = &log
	defer func() {
		if err != nil {
			err = fmt.Errorf("start %s: %w: %.500s", strings.Join(args, " "), err, log.Bytes())
		}
	}()
	var out io.Reader
	if own {
		if s.in, err = s.command.StdinPipe(); err != nil {
			return nil, err
		}
		if out, err = s.command.StdoutPipe(); err != nil {
			return nil, err
		}
	}
	if err := s.command.Start(); err != nil {
		return nil, err
	}
	if own {
		r := bufio.NewReader(out)
		if s.address, err = r.ReadString('\n'); err != nil {
			return nil, errors.Join(err, s.stop())
		}
		s.address, s.stats = strings.TrimSpace(s.address), json.NewDecoder(r)
		return s, nil
	}
	for begin := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		c, err := net.Dial("unix", socket)
		if err == nil {
			return s, c.Close()
		}
		if time.Since(begin) > startWait {
			return nil, errors.Join(err, s.stop())
		}
	}
}

// allocations asks our server what it allocated since its start.
func (s *server) allocations() (uint64, error) {
	if s.stats == nil {
		return 0, nil
	}
	var v serverStats
	if _, err := s.in.Write([]byte("\n")); err != nil {
		return 0, err
	}
	err := s.stats.Decode(&v)
	return v.Allocations, err
}

func (s *server) stop() error {
	if s.in != nil {
		s.in.Close()
		return s.command.Wait()
	}
	s.command.Process.Kill()
	s.command.Wait() // it says that it was killed
	return nil
}

func (b *bench) profile(name string) []string {
	if b.o.profiles == "" {
		return nil
	}
	return []string{"-profile", filepath.Join(b.o.profiles, name+".pprof")}
}

// clientRun is a client process.
type clientRun struct {
	command *exec.Cmd
	fio     bool
	write   bool
	out     bytes.Buffer
	log     bytes.Buffer
}

func (b *bench) startClient(ctx context.Context, k subjectKind, p netPattern, address, tag string) (*clientRun, error) {
	c := &clientRun{fio: k.fio, write: p.write}
	var args []string
	if k.fio {
		mode := map[[2]bool]string{{false, false}: "randread", {true, false}: "randwrite", {false, true}: "read", {true, true}: "write"}[[2]bool{p.write, p.sequential}]
		args = []string{"fio", "--name=bench", "--ioengine=nbd", "--uri=nbd+unix:///?socket=" + address, "--rw=" + mode,
			"--bs=" + strconv.Itoa(p.bytes), "--iodepth=" + strconv.Itoa(p.depth), "--size=" + strconv.Itoa(deviceBytes(k)), "--time_based",
			"--runtime=" + strconv.FormatInt((ramp+netTime).Milliseconds(), 10) + "ms",
			"--thread=1", "--output-format=json", "--randseed=1", "--norandommap"}
	} else {
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		args = slices.Concat([]string{self, "load", "-portal", address, "-bytes", strconv.Itoa(p.bytes), "-depth", strconv.Itoa(p.depth),
			fmt.Sprintf("-write=%t", p.write), fmt.Sprintf("-sequential=%t", p.sequential), "-time", cmp.Or(p.time, netTime).String()}, b.profile("client."+tag))
	}
	c.command = b.lab.Command(ctx, "taskset", append([]string{"-c", clientCPU}, args...)...)
	c.command.Stdout, c.command.Stderr = &c.out, &c.log
	return c, c.command.Start()
}

// deviceBytes is the size of what a subject serves.
func deviceBytes(k subjectKind) int {
	args := k.server(&netIO{}, "")
	if slices.Contains(args, memoryDevice(nil)) || slices.Contains(args, lvolDevice(&netIO{})) {
		return ramBytes
	}
	return netBytes
}

// wait returns what the client measured.
func (c *clientRun) wait() (r loadReport, err error) {
	if err := c.command.Wait(); err != nil {
		return r, fmt.Errorf("%s: %w: %.500s%.500s", strings.Join(c.command.Args, " "), err, c.log.Bytes(), c.out.Bytes())
	}
	out := c.out.Bytes()
	out = out[max(bytes.IndexByte(out, '{'), 0):] // fio may print a line before
	if !c.fio {
		err = json.Unmarshal(out, &r)
		return r, err
	}
	type side struct {
		IOPS    float64                                 `json:"iops"`
		All     float64                                 `json:"total_ios"`
		Latency struct{ Percentile map[string]float64 } `json:"clat_ns"`
	}
	var report struct {
		Jobs []struct {
			Error       int
			Read, Write side
		}
	}
	if err := json.Unmarshal(out, &report); err != nil {
		return r, fmt.Errorf("report of fio: %w", err)
	}
	if len(report.Jobs) != 1 || report.Jobs[0].Error != 0 {
		return r, fmt.Errorf("fio failed: %.500s", out)
	}
	s := report.Jobs[0].Read
	if c.write {
		s = report.Jobs[0].Write
	}
	return loadReport{s.IOPS, s.All, s.Latency.Percentile["50.000000"] / 1e3, s.Latency.Percentile["99.000000"] / 1e3}, nil
}
