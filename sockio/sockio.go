// Package sockio receives from stream sockets with little delay: when what a peer
// sends next is expected within microseconds it asks the kernel again and again for
// a bounded while before it lets the goroutine sleep.
//
// Going to sleep and being woken costs a process on an otherwise idle CPU some tens
// of microseconds, of the CPU as well as of time, and a peer that waits for each
// answer pays it with every request. Whether polling helps is seen from whether it
// did: a connection that is idle, or whose peer takes its time, costs nothing.
// docs/engine.md has the figures. The package knows no protocol.
package sockio

import (
	"io"
	"net"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Reader reads from a connection. Only one goroutine may use it; closing the
// connection, from any, ends a Read.
type Reader struct {
	nc     net.Conn
	raw    syscall.RawConn // nil when nc is no plain socket
	poller Poller

	// Park, if set, is called before Read lets the goroutine sleep, with the buffer
	// that was given to Read, and returns the one to use instead: the moment to do
	// with less memory.
	Park func(p []byte) []byte

	// Made once, so that Read allocates nothing.
	receive func(fd uintptr) bool
	once    func(fd uintptr) bool
	again   func() bool

	fd    uintptr // valid while receive runs
	p     []byte
	n     int
	errno syscall.Errno
}

// NewReader makes a Reader of a connection. What is no TCP or Unix socket is read
// through its own Read.
func NewReader(nc net.Conn) *Reader {
	r := &Reader{nc: nc}
	switch nc.(type) {
	case *net.TCPConn, *net.UnixConn:
		if raw, err := nc.(syscall.Conn).SyscallConn(); err == nil {
			r.raw = raw
		}
	}
	r.receive, r.again = r.tryReceive, r.recv
	r.once = func(fd uintptr) bool {
		r.fd = fd
		r.recv()
		return true
	}
	return r
}

// Read implements io.Reader: it returns as soon as there is anything.
func (r *Reader) Read(p []byte) (int, error) {
	if r.raw == nil {
		return r.nc.Read(p)
	}
	if len(p) == 0 {
		return 0, nil
	}
	r.p = p
	err := r.raw.Read(r.receive)
	r.p = nil
	switch {
	case err != nil:
		return 0, err
	case r.errno != 0:
		return 0, r.errno
	case r.n == 0:
		return 0, io.EOF
	}
	return r.n, nil
}

// TryRead is Read that does not wait: it returns 0 without an error when nothing is
// there, and always for what is no plain socket.
func (r *Reader) TryRead(p []byte) (int, error) {
	if r.raw == nil || len(p) == 0 {
		return 0, nil
	}
	r.p = p
	err := r.raw.Read(r.once)
	r.p = nil
	switch {
	case err != nil:
		return 0, err
	case r.errno == unix.EAGAIN:
		return 0, nil
	case r.errno != 0:
		return 0, r.errno
	case r.n == 0:
		return 0, io.EOF
	}
	return r.n, nil
}

// tryReceive receives what is there, waiting a little. It is called again when it
// returned false and the socket became readable.
func (r *Reader) tryReceive(fd uintptr) bool {
	r.fd = fd
	if r.recv() {
		r.poller.Done()
		return true
	}
	if r.poller.Wait(r.again) {
		return true
	}
	if r.Park != nil {
		r.p = r.Park(r.p)
	}
	return false
}

// recv receives once, and returns false if nothing is there. The call never waits, so
// the scheduler need not know of it.
func (r *Reader) recv() bool {
	for {
		n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, r.fd, uintptr(unsafe.Pointer(unsafe.SliceData(r.p))), uintptr(len(r.p)), unix.MSG_DONTWAIT, 0, 0)
		if errno == unix.EINTR {
			continue
		}
		r.n, r.errno = int(n), errno
		if errno == 0 {
			synced(r.fd)
		}
		return errno != unix.EAGAIN
	}
}
