package fuse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
)

const (
	// maxIdleWorkers is how many goroutines wait for a request; each is a thread
	// in the kernel with a buffer. A burst gets more, up to Options.Workers.
	maxIdleWorkers = 4
	// maxSpareBuffers is how many buffers are kept for the next burst.
	maxSpareBuffers = 16
	// spareFor is how long they are kept.
	spareFor = 2 * time.Second

	// inOffset is where requests are read to in a buffer, so that the data of a
	// WRITE, and the data of a READ's reply, start on a page.
	inOffset    = pageBytes - inHeaderBytes - 40
	outOffset   = pageBytes - outHeaderBytes
	dataOffset  = pageBytes
	maxIOBytes  = 1 << 20
	bufferBytes = dataOffset + maxIOBytes
)

// conn is the connection to the kernel with the goroutines that serve it.
//
// Each of them reads requests from the one descriptor, and waits for the next in
// epoll, of which the kernel wakes one per request. That costs a thread each, but no
// hand-over between goroutines, which would be most of the time a small request
// takes. They do not wait in read(2), because nothing could end that wait but a
// request: a process that made one of its own would wait for itself.
type conn struct {
	p     *Presenter
	fd    int // non-blocking
	epoll int // says that fd is readable, or that wake is
	wake  int // eventfd that stop makes readable for good

	wg       sync.WaitGroup
	workers  atomic.Int32 // all
	idle     atomic.Int32 // those that wait for a request
	stopping atomic.Bool
	// interrupted is set when requests that fail are the next process's to answer.
	interrupted atomic.Bool

	gone     chan struct{} // closed when the kernel has ended the connection
	goneOnce sync.Once

	spareMu sync.Mutex
	spare   [][]byte  // guarded by spareMu: mapped buffers not in use
	spareAt time.Time // guarded by spareMu: when one was last taken or given back
	trim    *time.Timer
}

// newConn takes over fd, also when it fails.
func newConn(p *Presenter, fd int) (*conn, error) {
	c := &conn{p: p, fd: fd, epoll: -1, wake: -1, gone: make(chan struct{})}
	c.trim = time.AfterFunc(time.Hour, c.trimSpare)
	c.trim.Stop()
	err := unix.SetNonblock(fd, true)
	if err == nil {
		c.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	}
	if err == nil {
		c.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	}
	for _, watch := range []int{c.fd, c.wake} {
		if err == nil {
			err = unix.EpollCtl(c.epoll, unix.EPOLL_CTL_ADD, watch, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(watch)})
		}
	}
	if err != nil {
		c.close()
		return nil, fmt.Errorf("set up the connection: %w", err)
	}
	return c, nil
}

func (c *conn) start() {
	c.spawn()
	c.spawn()
}

// stop ends serving: requests at work are answered, the others stay with the kernel.
// With interrupt, which makes them fail, those that fail stay with it too.
func (c *conn) stop(interrupt func()) {
	if interrupt != nil {
		c.interrupted.Store(true)
	}
	c.stopping.Store(true)
	if interrupt != nil {
		interrupt()
	}
	unix.Write(c.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	c.wg.Wait()
}

// close closes the descriptors; nobody may use the connection any more.
func (c *conn) close() {
	c.trim.Stop()
	c.spareMu.Lock()
	defer c.spareMu.Unlock()
	for _, b := range c.spare {
		unix.Munmap(b)
	}
	c.spare = nil
	for _, fd := range []*int{&c.fd, &c.epoll, &c.wake} {
		if *fd >= 0 {
			unix.Close(*fd)
			*fd = -1
		}
	}
}

// buffer returns memory for one worker, all of it resident. When a thread that is
// being killed copies a request to a page which is not there, the kernel does not
// bring the page in any more, takes the request for failed and answers it with EIO;
// with its page there, the request is either not taken or sent again later.
//
// It is outside the Go heap, because it is large and must not make the garbage
// collector believe that there is much to collect.
func (c *conn) buffer() ([]byte, error) {
	c.spareMu.Lock()
	if n := len(c.spare); n > 0 {
		b := c.spare[n-1]
		c.spare = c.spare[:n-1]
		c.spareMu.Unlock()
		return b, nil
	}
	c.spareMu.Unlock()
	const flags = unix.MAP_ANON | unix.MAP_PRIVATE | unix.MAP_POPULATE
	b, err := unix.Mmap(-1, 0, bufferBytes, unix.PROT_READ|unix.PROT_WRITE, flags|unix.MAP_LOCKED)
	if err == unix.EAGAIN || err == unix.EPERM { // RLIMIT_MEMLOCK; without swap it makes no difference
		b, err = unix.Mmap(-1, 0, bufferBytes, unix.PROT_READ|unix.PROT_WRITE, flags)
	}
	if err != nil {
		return nil, fmt.Errorf("map a buffer: %w", err)
	}
	return b, nil
}

func (c *conn) giveBack(b []byte) {
	c.spareMu.Lock()
	defer c.spareMu.Unlock()
	if len(c.spare) < maxSpareBuffers && !c.stopping.Load() {
		c.spare = append(c.spare, b)
		c.spareAt = time.Now()
		c.trim.Reset(spareFor)
		return
	}
	unix.Munmap(b)
}

func (c *conn) trimSpare() {
	c.spareMu.Lock()
	defer c.spareMu.Unlock()
	if idle := time.Since(c.spareAt); idle < spareFor && !c.stopping.Load() {
		c.trim.Reset(spareFor - idle)
		return
	}
	for _, b := range c.spare {
		unix.Munmap(b)
	}
	c.spare = nil
}

// spawn adds a worker unless there are as many as allowed.
func (c *conn) spawn() {
	if c.workers.Add(1) > int32(c.p.options.Workers) || c.stopping.Load() {
		c.workers.Add(-1)
		return
	}
	buf, err := c.buffer()
	if err != nil {
		c.workers.Add(-1)
		c.p.log.Error("fuse: another worker", "error", err)
		return
	}
	c.idle.Add(1)
	c.wg.Go(func() {
		c.work(&worker{c: c, p: c.p, buf: buf})
		c.workers.Add(-1)
		c.giveBack(buf)
	})
}

// work serves requests until there are enough others who wait for them.
func (c *conn) work(w *worker) {
	for !c.stopping.Load() {
		n, err := c.next(w)
		left := c.idle.Add(-1)
		if err != nil {
			if err != errStopping {
				c.ended(err)
			}
			return
		}
		if left == 0 {
			c.spawn()
		}
		w.serve(w.buf[inOffset : inOffset+n])
		if c.idle.Add(1) > maxIdleWorkers {
			break
		}
	}
	c.idle.Add(-1)
}

var errStopping = errors.New("stopping")

// next waits for a request and reads it to w.buf.
func (c *conn) next(w *worker) (int, error) {
	for {
		n, err := unix.Read(c.fd, w.buf[inOffset:])
		switch err {
		case nil:
			return n, nil
		case unix.EINTR, unix.ENOENT: // ENOENT: its caller gave up
			continue
		case unix.EAGAIN:
		default:
			return 0, err
		}
		if c.stopping.Load() {
			return 0, errStopping
		}
		if _, err := unix.EpollWait(c.epoll, w.events[:], -1); err != nil && err != unix.EINTR {
			return 0, err
		}
	}
}

// ended notes that the kernel will send no more.
func (c *conn) ended(err error) {
	c.goneOnce.Do(func() {
		if !c.p.closed.Load() {
			c.p.log.Warn("fuse: the kernel ended the connection", "dir", c.p.options.Dir, "error", err)
		}
		close(c.gone)
	})
}

// notify sends a notification.
func (c *conn) notify(code int32, encode func(data []byte) int) error {
	var b [outHeaderBytes + 64]byte
	n := outHeaderBytes
	if encode != nil {
		n += encode(b[outHeaderBytes:])
	}
	le.PutUint32(b[:], uint32(n))
	le.PutUint32(b[4:], uint32(code))
	_, err := unix.Write(c.fd, b[:n])
	return err
}

// invalidate drops the kernel's cached pages of a node that nobody has open. That
// the kernel may not know the node is no error.
func (c *conn) invalidate(node uint64) {
	// struct fuse_notify_inval_inode_out: ino 8, offset 8, length 8 (0: to the end)
	c.notify(notifyInvalInode, func(b []byte) int {
		le.PutUint64(b, node)
		return 24
	})
}

const fsType = "fuse.thaw"

func mountSource(token string) string { return "thaw-" + token }
func keeperName(token string) string  { return "fuse-" + token }

// connect takes over the mount that is there, or makes a new one. It leaves the
// state loaded. The order of the steps of making one, and what a process that finds
// one of them done last does:
//
//	state with a new token, no INIT   no such mount, nothing in the keeper: anew
//	descriptor put into the keeper    no such mount: dropped, anew
//	mounted                           taken over; INIT is there to be read
//	INIT read                         taken over; INIT is sent again
//	INIT in the state                 taken over; INIT is sent again
//	INIT answered                     taken over
func (p *Presenter) connect() (fd int, resumed bool, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), initWait)
	defer cancel()
	// The path without symbolic links, as the kernel will list it; the last
	// element is not touched, because a mount there may be dead or ours to serve.
	parent, base := filepath.Split(filepath.Clean(p.options.Dir))
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return -1, false, err
	}
	if parent, err = filepath.EvalSymlinks(parent); err != nil {
		return -1, false, err
	}
	p.options.Dir = filepath.Join(parent, base)

	old, err := loadState(p.options.StatePath)
	if err != nil {
		if !errors.Is(err, kind.Corrupt) {
			return -1, false, err
		}
		p.log.Error("fuse: state is damaged; disks of the old mount are lost", "error", err)
	}
	top, err := topMount(p.options.Dir)
	if err != nil {
		return -1, false, err
	}
	if top != nil && top.FSType != fsType {
		return -1, false, kind.Errorf(kind.Exists, "it is the mount point of %s (%s)", top.Source, top.FSType)
	}
	if old != nil {
		fd, reason := p.inherit(ctx, old, top)
		if reason == "" {
			p.state = old
			if err := p.save(func(s *state) { s.Clean = false }); err != nil {
				unix.Close(fd)
				return -1, false, err
			}
			return fd, true, nil
		}
		if top != nil {
			p.log.Error("fuse: the old mount cannot be taken over; its users get errors", "dir", p.options.Dir, "reason", reason)
		}
	}
	var tokens []string // of connections that nobody will take over
	if old != nil {
		tokens = append(tokens, old.Token)
	}
	for ; top != nil; top, err = topMount(p.options.Dir) {
		if token, ok := strings.CutPrefix(top.Source, mountSource("")); ok {
			tokens = append(tokens, token)
		}
		if len(tokens) > 64 { // far above what can have piled up
			return -1, false, kind.Errorf(kind.InUse, "old mounts cannot be detached")
		}
		// Force aborts the connection, so that nobody waits for it for ever.
		err := unix.Unmount(p.options.Dir, unix.MNT_FORCE|unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && err != unix.EINVAL {
			return -1, false, fmt.Errorf("detach the old mount: %w", err)
		}
	}
	if err != nil {
		return -1, false, err
	}
	for _, token := range tokens {
		if p.options.Keeper == nil {
			break
		}
		if err := p.options.Keeper.Drop(ctx, keeperName(token)); err != nil && kind.Of(err) != kind.Invalid {
			return -1, false, err
		}
	}
	if p.state, err = newState(); err != nil {
		return -1, false, err
	}
	if err := p.state.save(p.options.StatePath); err != nil {
		return -1, false, err
	}
	fd, err = p.mount(ctx)
	return fd, false, err
}

// inherit returns the descriptor of the mount that state s and mount top describe,
// or why there is none to go on with.
func (p *Presenter) inherit(ctx context.Context, s *state, top *mountinfo.Info) (int, string) {
	switch {
	case top == nil:
		return -1, "it is not mounted"
	case top.Source != mountSource(s.Token):
		return -1, "the mount is not the one that the state describes"
	case p.options.Keeper == nil:
		return -1, "there is no keeper"
	case s.Init != nil && s.Init.Flags&flagHasResend == 0 && !s.Clean:
		return -1, "this kernel cannot send again what a killed process had read"
	}
	fd, err := p.options.Keeper.Get(ctx, keeperName(s.Token))
	if err != nil {
		return -1, err.Error()
	}
	// A connection that was aborted, or unmounted everywhere else, polls as an
	// error.
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	if _, err := unix.Poll(poll, 0); err != nil || poll[0].Revents&unix.POLLERR != 0 {
		unix.Close(fd)
		return -1, "the kernel has ended the connection"
	}
	return fd, ""
}

// mount makes a new mount whose descriptor the keeper has before the mount exists.
func (p *Presenter) mount(ctx context.Context) (int, error) {
	if err := os.Mkdir(p.options.Dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return -1, err
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, kind.Errorf(kind.Unsupported, "open /dev/fuse: %w: load the module (modprobe fuse) or use a kernel with CONFIG_FUSE_FS, and run as root", err)
	}
	if p.options.Keeper != nil {
		if err := p.options.Keeper.Put(ctx, keeperName(p.state.Token), fd); err != nil {
			unix.Close(fd)
			return -1, err
		}
	}
	data := "fd=" + strconv.Itoa(fd) + ",rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
	if err := unix.Mount(mountSource(p.state.Token), p.options.Dir, fsType, unix.MS_NODEV|unix.MS_NOSUID|unix.MS_NOEXEC, data); err != nil {
		unix.Close(fd)
		if p.options.Keeper != nil {
			err = errors.Join(err, p.options.Keeper.Drop(ctx, keeperName(p.state.Token)))
		}
		return -1, fmt.Errorf("mount: %w", err)
	}
	return fd, nil
}

// topMount returns the uppermost mount on dir, or nil.
func topMount(dir string) (*mountinfo.Info, error) {
	infos, err := mountinfo.GetMounts(func(i *mountinfo.Info) (bool, bool) { return i.Mountpoint != dir, false })
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	if len(infos) == 0 {
		return nil, nil
	}
	return infos[len(infos)-1], nil
}

// readAheadKB lets the kernel read ahead a whole request.
const readAheadKB = maxIOBytes >> 10

// tune sets what INIT cannot: the kernel caps the read-ahead it negotiates at 128
// KiB.
func (p *Presenter) tune() {
	top, err := topMount(p.options.Dir)
	if err != nil || top == nil {
		return
	}
	path := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", top.Major, top.Minor)
	if err := os.WriteFile(path, []byte(strconv.Itoa(readAheadKB)), 0); err != nil {
		p.log.Debug("fuse: set read-ahead", "error", err)
	}
}
