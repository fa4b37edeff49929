package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"runtime/metrics"
	"runtime/pprof"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/nvme/host"
	"github.com/thaw-project/thaw/qcow2"
	"github.com/thaw-project/thaw/target"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/engine"
	"github.com/thaw-project/thaw/target/malloc"
	"github.com/thaw-project/thaw/target/nbd"
	"github.com/thaw-project/thaw/target/nvmf"
)

// benchNQN is the subsystem that a measured target serves.
const benchNQN = "nqn.2014-08.org.example:bench"

// serverStats is what a server process answers for every line it reads.
type serverStats struct {
	Allocations uint64 // objects allocated since its start
}

// serve is the program "bench serve": one of our targets with one device, in a process
// of its own that can say what it allocates. It prints where it listens, answers each line of its standard
// input with its stats, and ends with it.
func serve(args []string) (err error) {
	f := flag.NewFlagSet("serve", flag.ContinueOnError)
	protocol := f.String("protocol", "nvmf", "nvmf or nbd")
	engineName := f.String("engine", "", "shared-nothing or thread-pool")
	device := f.String("device", "", "file:PATH, memory:BYTES, qcow2:PATH:BASE or lvol:DIR:NAME")
	socket := f.String("socket", "", "Unix socket of nbd")
	profile := f.String("profile", "", "file for a CPU profile")
	if err := f.Parse(args); err != nil {
		return err
	}
	e, err := engine.Parse(*engineName)
	if err != nil {
		return err
	}
	stop, err := profileTo(*profile)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	if what, rest, _ := strings.Cut(*device, ":"); *protocol == "nvmf" && (what == "file" || what == "memory") {
		address, done, err := serveTarget(e, what, rest)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, done()) }()
		return answer(address)
	}
	dev, done, err := openDevice(*device)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	var address string
	switch *protocol {
	case "nvmf":
		t, err := nvmf.New(nvmf.Options{Engine: e})
		if err != nil {
			return err
		}
		defer t.Close()
		if err := t.CreateSubsystem(nvmf.SubsystemConfig{NQN: benchNQN, AllowAnyHost: true}); err != nil {
			return err
		}
		if _, err := t.AddNvmeNamespace(benchNQN, nvmf.NvmeNamespaceConfig{Device: dev, BlockBytes: 4096, Inline: true}); err != nil {
			return err
		}
		if address, err = t.AddListener(benchNQN, nvmf.ListenerConfig{Address: "127.0.0.1:0"}); err != nil {
			return err
		}
	case "nbd":
		s := nbd.New(nbd.Config{Engine: e})
		ctx, cancel := contextTimeout()
		defer cancel()
		defer s.Shutdown(ctx)
		if err := s.AddExport(nbd.Export{Name: "", Device: dev}); err != nil {
			return err
		}
		if err := s.ListenUnix(*socket); err != nil {
			return err
		}
		address = *socket
	default:
		return fmt.Errorf("protocol %q", *protocol)
	}
	return answer(address)
}

// serveTarget makes a target as "thaw target" is, told what to do by the same calls,
// with a file or memory as its only bdev.
func serveTarget(e engine.Kind, what, rest string) (address string, done func() error, err error) {
	root, err := os.MkdirTemp("", "thaw-bench-target.")
	if err != nil {
		return "", nil, err
	}
	t, err := target.New(target.Options{Root: root, Engine: e})
	if err != nil {
		return "", nil, errors.Join(err, os.RemoveAll(root))
	}
	done = func() error { return errors.Join(t.Close(), os.RemoveAll(root)) }
	defer func() {
		if err != nil {
			err = errors.Join(err, done())
		}
	}()
	// The port is free until somebody else takes it in the next millisecond.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	address = l.Addr().String()
	l.Close()
	_, port, _ := net.SplitHostPort(address)
	create := [2]string{"bdev_aio_create", fmt.Sprintf(`{"name":"d","filename":%q,"block_size":4096}`, rest)}
	if what == "memory" {
		n, err := strconv.ParseInt(rest, 10, 64)
		if err != nil {
			return "", nil, err
		}
		create = [2]string{"bdev_malloc_create", fmt.Sprintf(`{"name":"d","num_blocks":%d,"block_size":4096}`, n>>12)}
	}
	methods := t.Methods()
	for _, call := range [][2]string{create,
		{"nvmf_create_transport", `{"trtype":"TCP"}`},
		{"nvmf_create_subsystem", fmt.Sprintf(`{"nqn":%q,"allow_any_host":true}`, benchNQN)},
		{"nvmf_subsystem_add_ns", fmt.Sprintf(`{"nqn":%q,"namespace":{"bdev_name":"d"}}`, benchNQN)},
		{"nvmf_subsystem_add_listener", fmt.Sprintf(`{"nqn":%q,"listen_address":{"trtype":"TCP","adrfam":"IPv4","traddr":"127.0.0.1","trsvcid":%q}}`, benchNQN, port)},
	} {
		if _, err := methods[call[0]].Handle(context.Background(), json.RawMessage(call[1])); err != nil {
			return "", nil, fmt.Errorf("%s: %w", call[0], err)
		}
	}
	if what == "memory" {
		err = fillTarget(address)
	}
	return address, done, err
}

// fillTarget writes the nvmeNamespace of a target, so that reads find pages and not the
// kernel's one of zeros.
func fillTarget(address string) error {
	ctx, cancel := contextTimeout()
	defer cancel()
	h, err := host.Connect(ctx, host.Config{Portals: []string{address}, SubNQN: benchNQN})
	if err != nil {
		return err
	}
	defer h.Close()
	d, err := h.Open(1)
	if err != nil {
		return err
	}
	return fillBytes(d, d.SizeBytes())
}

// answer prints where the server listens and answers each line of standard input.
func answer(address string) error {
	fmt.Println(address)
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:objects"}}
	out := json.NewEncoder(os.Stdout)
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		metrics.Read(sample)
		if err := out.Encode(serverStats{Allocations: sample[0].Value.Uint64()}); err != nil {
			return err
		}
	}
	return nil
}

// profileTo writes a CPU profile to a file until stop is called; an empty path is none.
func profileTo(path string) (stop func() error, err error) {
	if path == "" {
		return func() error { return nil }, nil
	}
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() error {
		pprof.StopCPUProfile()
		return f.Close()
	}, nil
}

// openDevice opens what the -device flag names.
func openDevice(spec string) (bdev.Device, func() error, error) {
	what, rest, _ := strings.Cut(spec, ":")
	switch what {
	case "file":
		d, err := openDisk(rest)
		if err != nil {
			return nil, nil, err
		}
		return d, d.Close, nil
	case "memory":
		n, err := strconv.ParseInt(rest, 10, 64)
		if err != nil {
			return nil, nil, err
		}
		d, err := malloc.New(n)
		if err != nil {
			return nil, nil, err
		}
		// Pages that exist, not the one of zeros.
		return d, d.Close, fillBytes(d, n)
	case "qcow2":
		path, base, _ := strings.Cut(rest, ":")
		backing, err := openDisk(base)
		if err != nil {
			return nil, nil, err
		}
		i, err := qcow2.Open(path, qcow2.OpenOptions{Backing: backing, BackingSizeBytes: backing.SizeBytes()})
		if err != nil {
			return nil, nil, errors.Join(err, backing.Close())
		}
		return i, func() error { return errors.Join(i.Close(), backing.Close()) }, nil
	case "lvol":
		dir, name, _ := strings.Cut(rest, ":")
		s, err := lvol.Open(lvol.Options{Dir: dir})
		if err != nil {
			return nil, nil, err
		}
		l, err := s.OpenLvol(name, true)
		if err != nil {
			return nil, nil, errors.Join(err, s.Close())
		}
		return l, func() error { return errors.Join(l.Close(), s.Close()) }, nil
	}
	return nil, nil, fmt.Errorf("device %q", spec)
}

// disk is a file as a device: the same system calls that an lvol or a C server uses,
// and nothing else.
type disk struct {
	fd   int
	size int64
}

func openDisk(path string) (*disk, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return &disk{fd: fd, size: st.Size}, nil
}

func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	n := 0
	for n < len(p) {
		m, err := unix.Pread(d.fd, p[n:], off+int64(n))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return n, err
		case m == 0:
			return n, io.EOF
		default:
			n += m
		}
	}
	return n, nil
}

func (d *disk) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off > d.size || int64(len(p)) > d.size-off {
		return 0, kind.Errorf(kind.Invalid, "write of %d bytes at %d of %d", len(p), off, d.size)
	}
	n := 0
	for n < len(p) {
		m, err := unix.Pwrite(d.fd, p[n:], off+int64(n))
		if err != nil && err != unix.EINTR {
			return n, err
		}
		n += max(m, 0)
	}
	return n, nil
}

func (d *disk) Flush() error { return unix.Fdatasync(d.fd) }
func (d *disk) WriteZeroes(off, n int64) error {
	return unix.Fallocate(d.fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}
func (d *disk) Discard(off, n int64) error {
	return unix.Fallocate(d.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}
func (d *disk) SizeBytes() int64 { return d.size }
func (d *disk) ReadOnly() bool   { return false }
func (d *disk) Close() error     { return unix.Close(d.fd) }
