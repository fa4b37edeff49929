package nbd

import (
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// stream is a connection as the transmission phase sees it. One goroutine receives;
// one at a time sends.
type stream interface {
	// recv reads at least one byte into p, or returns errIdle when there is none:
	// at once, or with block only after hotWait. Then call wait.
	recv(p []byte, block bool) (int, error)
	// wait returns when recv would not wait, or at the deadline with an error. The
	// zero time is no deadline. It costs no thread.
	wait(deadline time.Time) error
	// send writes all of bufs, which it may change.
	send(bufs [][]byte, deadline time.Duration) error
	// closeRead makes recv and wait return io.EOF, now and later.
	closeRead()
	// abort makes everything fail at once. The descriptor stays open until Close.
	abort()
	Close() error
}

// errIdle says that a peer sends nothing for the moment.
var errIdle = errors.New("idle")

// hotWait is how long a thread waits in recv for the next request before the
// connection is handed to the runtime's poller. A blocking call answers a request
// with one system call and no scheduling; 20 ms is long against the gaps of a busy
// connection and short for a thread to be kept.
const hotWait = 20 * time.Millisecond

// maxHot bounds the threads of one server that wait so, all connections together;
// others use the poller at once. hotLimit tells why it may be none.
const maxHot = 16

// hotLimit is how many threads may wait in system calls. With one processor the
// runtime takes it from a waiting thread after 20 us and gives it back at the next
// request, which costs more than the poller.
func hotLimit() int32 {
	if runtime.GOMAXPROCS(0) < 2 {
		return 0
	}
	return maxHot
}

// maxIovec bounds the buffers sent with one system call.
const maxIovec = 64

// socket is a stream on a Unix or TCP socket. Its descriptor is in blocking mode;
// calls that must not block say so with MSG_DONTWAIT. The descriptor is used outside
// the net package, so only the owner closes it, after all others are done.
type socket struct {
	conn net.Conn
	raw  syscall.RawConn
	fd   int
	hot  *atomic.Int32 // threads of the server that wait
	max  int32         // of hot

	readable func(uintptr) bool
	writable func(uintptr) bool
	sendErr  error

	iov [maxIovec]unix.Iovec
	msg unix.Msghdr
}

// newSocket takes over conn; nil when it is no plain socket.
func newSocket(conn net.Conn, hot *atomic.Int32) *socket {
	switch conn.(type) {
	case *net.UnixConn, *net.TCPConn:
	default:
		return nil
	}
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		return nil
	}
	s := &socket{conn: conn, raw: raw, hot: hot, max: hotLimit()}
	if conn.SetDeadline(time.Time{}) != nil {
		return nil
	}
	tv := unix.NsecToTimeval(int64(hotWait))
	ok := false
	if err := raw.Control(func(fd uintptr) {
		s.fd = int(fd)
		ok = unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv) == nil &&
			unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv) == nil &&
			unix.SetNonblock(s.fd, false) == nil
	}); err != nil || !ok {
		return nil
	}
	s.readable = func(uintptr) bool {
		var b [1]byte
		_, errno := recvfrom(s.fd, b[:], unix.MSG_DONTWAIT|unix.MSG_PEEK)
		return errno != unix.EAGAIN
	}
	s.writable = func(uintptr) bool {
		s.sendErr = s.sendmsg(unix.MSG_DONTWAIT)
		return s.sendErr != unix.EAGAIN
	}
	return s
}

func recvfrom(fd int, p []byte, flags int) (int, syscall.Errno) {
	for {
		n, _, errno := unix.Syscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), uintptr(flags), 0, 0)
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

func (s *socket) recv(p []byte, block bool) (int, error) {
	flags := 0
	if s.hot.Add(1) > s.max || !block {
		flags = unix.MSG_DONTWAIT
	}
	n, errno := recvfrom(s.fd, p, flags)
	s.hot.Add(-1)
	switch {
	case errno == unix.EAGAIN:
		return 0, errIdle
	case errno != 0:
		return 0, errno
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

func (s *socket) wait(deadline time.Time) error {
	if !deadline.IsZero() {
		if err := s.conn.SetReadDeadline(deadline); err != nil {
			return err
		}
		defer s.conn.SetReadDeadline(time.Time{})
	}
	return s.raw.Read(s.readable)
}

// sendmsg sends the prepared vector once and takes from it what was sent.
func (s *socket) sendmsg(flags int) error {
	for {
		n, _, errno := unix.Syscall(unix.SYS_SENDMSG, uintptr(s.fd), uintptr(unsafe.Pointer(&s.msg)), uintptr(flags|unix.MSG_NOSIGNAL))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return errno
		}
		for n > 0 {
			v := s.msg.Iov
			if take := min(uint64(n), v.Len); take < v.Len {
				v.Base = (*byte)(unsafe.Add(unsafe.Pointer(v.Base), take))
				v.Len -= take
				return nil
			}
			n -= uintptr(v.Len)
			s.msg.Iovlen--
			if s.msg.Iovlen > 0 {
				s.msg.Iov = (*unix.Iovec)(unsafe.Add(unsafe.Pointer(v), unsafe.Sizeof(*v)))
			}
		}
		return nil
	}
}

func (s *socket) send(bufs [][]byte, timeout time.Duration) error {
	for len(bufs) > 0 {
		n := min(len(bufs), maxIovec)
		for i, b := range bufs[:n] {
			s.iov[i].Base = unsafe.SliceData(b)
			s.iov[i].SetLen(len(b))
		}
		s.msg.Iov = &s.iov[0]
		s.msg.Iovlen = uint64(n)
		if err := s.sendVector(timeout); err != nil {
			return err
		}
		clear(s.iov[:n])
		bufs = bufs[n:]
	}
	return nil
}

func (s *socket) sendVector(timeout time.Duration) error {
	var deadline time.Time
	for s.msg.Iovlen > 0 {
		flags := 0
		if s.hot.Add(1) > s.max {
			flags = unix.MSG_DONTWAIT
		}
		err := s.sendmsg(flags)
		s.hot.Add(-1)
		if err == nil {
			continue
		}
		if err != unix.EAGAIN {
			return err
		}
		if deadline.IsZero() {
			deadline = time.Now().Add(timeout)
		}
		if err := s.conn.SetWriteDeadline(deadline); err != nil {
			return err
		}
		if err := s.raw.Write(s.writable); err != nil {
			return err
		}
		if s.sendErr != nil {
			return s.sendErr
		}
	}
	return nil
}

func (s *socket) closeRead() { unix.Shutdown(s.fd, unix.SHUT_RD) }
func (s *socket) abort()     { unix.Shutdown(s.fd, unix.SHUT_RDWR) }

func (s *socket) Close() error { return s.conn.Close() }

// plainWait is how often a plain stream looks whether its peer is late.
const plainWait = time.Second

// plain is a stream on any other connection, such as one under TLS.
type plain struct {
	conn net.Conn
	done atomic.Bool
}

func (s *plain) recv(p []byte, _ bool) (int, error) {
	s.conn.SetReadDeadline(time.Now().Add(plainWait))
	if s.done.Load() {
		return 0, io.EOF
	}
	n, err := s.conn.Read(p)
	if n > 0 {
		return n, nil
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return 0, errIdle
	}
	return 0, err
}

func (s *plain) wait(deadline time.Time) error {
	if !deadline.IsZero() && time.Now().After(deadline) {
		return os.ErrDeadlineExceeded
	}
	return nil
}

func (s *plain) send(bufs [][]byte, timeout time.Duration) error {
	if err := s.conn.SetWriteDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	v := net.Buffers(bufs)
	_, err := v.WriteTo(s.conn)
	return err
}

func (s *plain) closeRead() {
	s.done.Store(true)
	s.conn.SetReadDeadline(time.Unix(1, 0))
}

func (s *plain) abort() {
	s.done.Store(true)
	s.conn.SetDeadline(time.Unix(1, 0))
}

func (s *plain) Close() error { return s.conn.Close() }
