package nbd

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nbd"
	"github.com/thaw-project/thaw/nbd/kernel"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/target/bdev"
)

// machine stands in for the kernel's NBD client where there is none, with what the
// presenter relies on: devices keep waiting when their connections die, RECONFIGURE
// replaces a dead connection and silently drops what it does not need, requests are sent
// again. The real kernel is tested in a guest (vm_test.go).
type machine struct {
	mu      sync.Mutex
	changed *sync.Cond
	devices map[uint32]*device // guarded by mu
	busy    map[string]bool    // guarded by mu: paths that somebody uses
	dropped int                // guarded by mu: sockets that RECONFIGURE had no use for
}

type device struct {
	kernel.Device
	config  kernel.Config
	sockets []int // -1 when dead
	turn    int
}

func newMachine() *machine {
	m := &machine{devices: make(map[uint32]*device), busy: make(map[string]bool)}
	m.changed = sync.NewCond(&m.mu)
	return m
}

func (m *machine) Load(context.Context) error { return nil }

func dup(fd int) int {
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		panic(err)
	}
	return n
}

func (m *machine) Connect(c kernel.Config) (uint32, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	index := uint32(0)
	for m.devices[index] != nil {
		index++
	}
	d := &device{config: c, Device: kernel.Device{Index: index, Connected: true, Backend: c.Backend, SizeBytes: c.SizeBytes, ReadOnly: c.ServerFlags&nbd.FlagReadOnly != 0}}
	for _, fd := range c.Sockets {
		d.sockets = append(d.sockets, dup(fd))
	}
	m.devices[index] = d
	return index, nil
}

// dead tells whether the other end of a socket is gone.
func dead(fd int) bool {
	if fd < 0 {
		return true
	}
	var b [1]byte
	n, _, err := unix.Recvfrom(fd, b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	return n == 0 && err == nil || err != nil && err != unix.EAGAIN
}

func (m *machine) Reconfigure(index uint32, c kernel.Config) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.devices[index]
	if d == nil || d.Backend != c.Backend {
		return unix.EINVAL
	}
	for i, fd := range d.sockets {
		if dead(fd) {
			if fd >= 0 {
				unix.Close(fd)
			}
			d.sockets[i] = dup(c.Sockets[0])
			m.changed.Broadcast()
			return nil
		}
	}
	m.dropped++
	return nil
}

func (m *machine) Disconnect(index uint32) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if d := m.devices[index]; d != nil {
		for _, fd := range d.sockets {
			if fd >= 0 {
				unix.Close(fd)
			}
		}
		delete(m.devices, index)
		m.changed.Broadcast()
	}
	return nil
}

func (m *machine) Look(index uint32) (kernel.Device, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if d := m.devices[index]; d != nil {
		return d.Device, nil
	}
	return kernel.Device{}, fs.ErrNotExist
}

func (m *machine) Devices() (list []kernel.Device, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, d := range m.devices {
		list = append(list, d.Device)
	}
	return list, nil
}

func (m *machine) Claim(_ context.Context, path string, _ time.Duration) (func() error, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.busy[path] {
		return nil, kind.Errorf(kind.InUse, "%s is in use: test", path)
	}
	m.busy[path] = true
	return func() error { m.setBusy(path, false); return nil }, nil
}

func (m *machine) setBusy(path string, busy bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.busy[path] = busy
}

// cut kills connection i of a device as a timeout does.
func (m *machine) cut(index uint32, i int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	unix.Shutdown(m.devices[index].sockets[i], unix.SHUT_RDWR)
}

// do sends one request over a live connection of the device, again if that dies, and
// waits for connections when there is none. Only one request at a time.
func (m *machine) do(path string, command uint16, off int64, p []byte) error {
	var index uint32
	if _, err := fmt.Sscanf(path, "/dev/nbd%d", &index); err != nil {
		return err
	}
	for {
		m.mu.Lock()
		var fd int
		for fd = -1; fd < 0; {
			d := m.devices[index]
			if d == nil {
				m.mu.Unlock()
				return unix.EIO
			}
			for range d.sockets {
				d.turn++
				if s := d.sockets[d.turn%len(d.sockets)]; !dead(s) {
					fd = dup(s)
					break
				}
			}
			if fd < 0 {
				m.changed.Wait()
			}
		}
		m.mu.Unlock()
		errno, err := exchange(fd, command, off, p)
		unix.Close(fd)
		if err == nil {
			if errno != 0 {
				return unix.Errno(errno)
			}
			return nil
		}
	}
}

func exchange(fd int, command uint16, off int64, p []byte) (uint32, error) {
	b := binary.BigEndian.AppendUint32(nil, nbd.MagicRequest)
	b = binary.BigEndian.AppendUint16(b, 0)
	b = binary.BigEndian.AppendUint16(b, command)
	b = binary.BigEndian.AppendUint64(b, 7)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	b = binary.BigEndian.AppendUint32(b, uint32(len(p)))
	if command == nbd.CmdWrite {
		b = append(b, p...)
	}
	s := rawSocket(fd)
	if _, err := s.Write(b); err != nil {
		return 0, err
	}
	var h [16]byte
	if _, err := io.ReadFull(s, h[:]); err != nil {
		return 0, err
	}
	errno := binary.BigEndian.Uint32(h[4:])
	if errno == 0 && command == nbd.CmdRead {
		if _, err := io.ReadFull(s, p); err != nil {
			return 0, err
		}
	}
	return errno, nil
}

// fileDevice is a bdev.Device on a file.
type fileDevice struct {
	f         *os.File
	sizeBytes int64
	readOnly  bool
}

func openFile(source present.Source, readOnly bool) (bdev.Device, error) {
	mode := os.O_RDWR
	if readOnly {
		mode = os.O_RDONLY
	}
	f, err := os.OpenFile(source.Path, mode, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &fileDevice{f, st.Size(), readOnly}, nil
}

func (d *fileDevice) ReadAt(p []byte, off int64) (int, error) { return d.f.ReadAt(p, off) }
func (d *fileDevice) WriteAt(p []byte, off int64) (int, error) {
	if d.readOnly {
		return 0, kind.Errorf(kind.ReadOnly, "write")
	}
	return d.f.WriteAt(p, off)
}
func (d *fileDevice) Flush() error { return unix.Fdatasync(int(d.f.Fd())) }
func (d *fileDevice) Discard(off, n int64) error {
	return unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}
func (d *fileDevice) WriteZeroes(off, n int64) error { return d.Discard(off, n) }
func (d *fileDevice) SizeBytes() int64               { return d.sizeBytes }
func (d *fileDevice) ReadOnly() bool                 { return d.readOnly }
func (d *fileDevice) Close() error                   { return d.f.Close() }

func image(t testing.TB, name string, sizeBytes int) (present.Source, []byte) {
	t.Helper()
	data := make([]byte, sizeBytes)
	rand.Read(data)
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return present.Source{Kind: present.SourceLvol, Lvol: name, Path: path}, data
}

func (m *machine) wantRead(t testing.TB, path string, off int64, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	if err := m.do(path, nbd.CmdRead, off, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("read %d bytes at %d of %s: %v, equal %t", len(want), off, path, err, bytes.Equal(got, want))
	}
}

func wantKind(t testing.TB, err error, k kind.Kind) {
	t.Helper()
	if kind.Of(err) != k {
		t.Fatalf("got error %v, want kind %q", err, k)
	}
}

func testLogger() *slog.Logger {
	if !testing.Verbose() {
		return nil
	}
	return slog.New(slog.NewTextHandler(os.Stderr, nil))
}
