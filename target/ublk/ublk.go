// Package ublk shows a bdev.Device to the kernel of this machine as a block device,
// /dev/ublkbN, through the kernel's ublk driver (Linux 6.5).
//
// The kernel hands requests to the process over io_uring: one command per tag waits in
// the kernel, completes when a request has come, and commits its result and waits for
// the next in one. A device outlives the process that serves it (user recovery): when
// that is killed, the kernel keeps its requests, also those under way, and gives them
// to the process that calls Recover. Every request may thus be done twice, which is
// harmless for all of them.
//
// The package must not know what a device holds, nor who asked for it. The process
// must not itself open, read or write a device that it serves: a thread that waits for
// its own process keeps it from ending when it is killed, and nobody could take over.
//
// Names of the kernel's interface are in include/uapi/linux/ublk_cmd.h, what it does in
// drivers/block/ublk_drv.c.
package ublk

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/bits"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/bdev"
)

// Options configures New and Recover.
type Options struct {
	// Device is what is shown. The server does not close it.
	Device bdev.Device
	// ID is the N of /dev/ublkbN. New lets the kernel choose when it is negative.
	ID int
	// Queues is the number of hardware queues, each served by a thread of its own; 0
	// means 1. Before Linux 6.16 there is one, whatever is asked for: a process killed
	// between taking over two queues would leave a device that crashes the kernel
	// when the next one takes over.
	Queues int
	// Depth is how many requests the kernel may have under way in a queue, 1 to 1024;
	// 0 means 64, enough to keep a device at the far end of a network busy.
	Depth int
	// MaxIOBytes bounds a read or write, a multiple of 4096 up to 4 MiB; 0 means 512
	// KiB. Depth times this is the memory a busy queue may take.
	MaxIOBytes int
	// BlockBytes is the logical block size, 512 or 4096; 0 means 512.
	BlockBytes int
	// ReadOnly makes the block device read-only, which it is anyway if Device is.
	ReadOnly bool
	// Workers bounds the requests of a queue handled at once by a device too slow for
	// the queue's own thread; 0 means 32.
	Workers int
	// Owner is a mark that the kernel keeps with the device, for List. Recover
	// refuses a device with another one.
	Owner uint64
	// Logger gets what an operator should know; nil discards it.
	Logger *slog.Logger

	// For tests: who handles reads and writes, and whether there may be several queues
	// on any kernel.
	dispatch  dispatch
	anyQueues bool
}

// dispatch is who handles a request.
type dispatch int

const (
	adaptive  dispatch = iota // whoever has been faster
	byQueue                   // always the queue's thread
	byWorkers                 // always a worker
)

const (
	maxDepth       = 1024
	maxMaxIOBytes  = 4 << 20
	maxQueues      = 64
	maxWorkers     = 1024
	defaultDepth   = 64
	defaultIOBytes = 512 << 10
	defaultWorkers = 32
)

func (o *Options) validate() error {
	if o.Device == nil {
		return kind.Errorf(kind.Invalid, "ublk: Device is missing")
	}
	o.Queues = cmp.Or(o.Queues, 1)
	o.Depth = cmp.Or(o.Depth, defaultDepth)
	o.MaxIOBytes = cmp.Or(o.MaxIOBytes, defaultIOBytes)
	o.BlockBytes = cmp.Or(o.BlockBytes, 512)
	o.Workers = cmp.Or(o.Workers, defaultWorkers)
	switch size := o.Device.SizeBytes(); {
	case o.ID > math.MaxInt32:
		return kind.Errorf(kind.Invalid, "ublk: id %d is too large", o.ID)
	case o.Queues < 1 || o.Queues > maxQueues:
		return kind.Errorf(kind.Invalid, "ublk: %d queues, must be 1 to %d", o.Queues, maxQueues)
	case o.Depth < 1 || o.Depth > maxDepth:
		return kind.Errorf(kind.Invalid, "ublk: queue depth %d, must be 1 to %d", o.Depth, maxDepth)
	case o.MaxIOBytes < 4096 || o.MaxIOBytes > maxMaxIOBytes || o.MaxIOBytes%os.Getpagesize() != 0:
		return kind.Errorf(kind.Invalid, "ublk: requests of %d bytes, must be a multiple of %d up to %d", o.MaxIOBytes, os.Getpagesize(), maxMaxIOBytes)
	case o.BlockBytes != 512 && o.BlockBytes != 4096:
		return kind.Errorf(kind.Invalid, "ublk: blocks of %d bytes, must be 512 or 4096", o.BlockBytes)
	case o.Workers < 1 || o.Workers > maxWorkers:
		return kind.Errorf(kind.Invalid, "ublk: %d workers, must be 1 to %d", o.Workers, maxWorkers)
	case size <= 0 || size%int64(o.BlockBytes) != 0:
		return kind.Errorf(kind.Invalid, "ublk: a device of %d bytes is no multiple of blocks of %d", size, o.BlockBytes)
	}
	o.ReadOnly = o.ReadOnly || o.Device.ReadOnly()
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// params says to the kernel what the device is like.
func (o *Options) params() *params {
	p := &params{types: paramTypeBasic, basic: paramBasic{
		logicalShift:  uint8(bits.TrailingZeros(uint(o.BlockBytes))),
		physicalShift: 12,
		optimalShift:  12,
		minimumShift:  12,
		maxSectors:    uint32(o.MaxIOBytes >> sectorShift),
		devSectors:    uint64(o.Device.SizeBytes() >> sectorShift),
	}}
	if o.ReadOnly {
		p.basic.attrs = attrReadOnly
		return p
	}
	p.basic.attrs = attrVolatileCache | attrFUA
	p.types |= paramTypeDiscard
	p.discard = paramDiscard{
		granularity: 4096, maxDiscardSegments: 1,
		// A request's length is 32 bits of bytes.
		maxDiscardSectors: math.MaxUint32 >> sectorShift, maxWriteZeroesSectors: math.MaxUint32 >> sectorShift,
	}
	return p
}

// reached is told the steps of making and taking over a device, for tests that end the
// process there.
var reached = func(step string) {}

// Server serves one device. Its methods may be called concurrently.
type Server struct {
	o     Options
	log   *slog.Logger
	info  devInfo
	char  int // /dev/ublkcN
	stats Stats

	queues   []*queue
	running  sync.WaitGroup // the queues
	gone     chan struct{}  // closed when all queues have ended
	stopping atomic.Bool    // the queues end and leave the device as it is
	lastLog  atomic.Int64   // Unix time of the last line about a failed request

	mu      sync.Mutex
	closed  bool          // guarded by mu: queues and descriptors are given back
	halting chan struct{} // guarded by mu: closed when halted is known; nil before Halt
	halted  error         // valid once halting is closed
}

// Stats counts what a server did.
type Stats struct {
	Reads, Writes, Flushes, Discards atomic.Int64 // requests; write-zeroes counts as Discards
	Errors                           atomic.Int64 // requests answered with an error
	BytesRead, BytesWritten          atomic.Int64
	ByQueue, ByWorkers               atomic.Int64 // requests, by who handled them
}

// New makes a device and gets ready to serve it. It is not visible before Start. The
// caller ends it with Stop. An ID in use is kind.Exists; a kernel without ublk is
// kind.Unsupported, see Probe.
func New(o Options) (*Server, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	features, err := probe()
	if err != nil {
		return nil, err
	}
	if features&featPerIODaemon == 0 && !o.anyQueues { // Linux 6.16
		o.Queues = 1
	}
	s := newServer(o)
	s.info = devInfo{
		queues: uint16(o.Queues), depth: uint16(o.Depth), maxIOBytes: uint32(o.MaxIOBytes),
		id: anyDevice, owner: o.Owner,
		flags: needed | features&featNoAutoPartScan,
	}
	if o.ID >= 0 {
		s.info.id = uint32(o.ID)
	}
	err = withControl(func(c *control) error {
		if err := c.add(&s.info); err != nil {
			return err
		}
		reached("added")
		err := c.setParams(s.info.id, o.params())
		if err == nil {
			err = s.serve()
		}
		if err != nil {
			s.Close()
			return errors.Join(err, c.del(s.info.id))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	reached("ready")
	return s, nil
}

func newServer(o Options) *Server {
	return &Server{o: o, log: o.Logger, char: -1, gone: make(chan struct{})}
}

// serve opens the character device and starts the queues; when it returns nil, the
// kernel has got the commands for all requests there can be.
func (s *Server) serve() (err error) {
	path := charPath(s.info.id)
	if s.char, err = unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		s.char = -1
		return fmt.Errorf("ublk: %w", &os.PathError{Op: "open", Path: path, Err: err})
	}
	ready := make(chan error, s.info.queues)
	for i := range int(s.info.queues) {
		q := &queue{s: s, id: i, depth: int(s.info.depth), maxIO: int(s.info.maxIOBytes), event: -1}
		s.queues = append(s.queues, q)
		s.running.Go(func() {
			<-onOwnThread(func() { q.run(ready) })
			q.end()
		})
	}
	go func() {
		s.running.Wait()
		close(s.gone)
	}()
	for range s.queues {
		err = errors.Join(err, <-ready)
	}
	return err
}

// ID is the N of /dev/ublkbN.
func (s *Server) ID() int { return int(s.info.id) }

// Path is the block device's.
func (s *Server) Path() string { return blockPath(s.info.id) }

// Info is what List says of the device.
func (s *Server) Info() Info { return makeInfo(s.info) }

// Stats are of this process.
func (s *Server) Stats() *Stats { return &s.stats }

// Gone is closed when nothing is served any more: after Halt, Stop or Close, or because
// somebody else has stopped or deleted the device.
func (s *Server) Gone() <-chan struct{} { return s.gone }

// Start makes the block device appear. The kernel reads it for partitions before Start
// returns.
func (s *Server) Start(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return kind.Errorf(kind.Canceled, "ublk: start device %d: %w", s.info.id, context.Cause(ctx))
	}
	err := withControl(func(c *control) error {
		return c.simple(cmdStartDev, s.info.id, "start device", uint64(os.Getpid()))
	})
	if err != nil {
		return err
	}
	if _, err := os.Lstat(s.Path()); err != nil {
		return kind.Errorf(kind.Unsupported, "ublk: start device %d: %w: is devtmpfs on /dev?", s.info.id, err)
	}
	return nil
}

// saturatedTimeout is how soon the kernel notices that the server of a device was
// killed while it had every request of a queue in its hands. Before Linux 6.16 the
// death is otherwise told by commands that wait for a request, and none does then; the
// default is 30 s. While the server lives, the timeout means nothing.
const saturatedTimeout = 2 * time.Second

// Tuning returns a file of sysfs and what should be written to it once the device is
// started, so that the death of a server under full load is noticed in 2 s instead of 30;
// an empty path says that this kernel needs no help. It has to be done by another process: the kernel may make the writer wait for
// requests that this one serves.
func (s *Server) Tuning() (path, data string) {
	if known.Load()&featPerIODaemon != 0 { // Linux 6.16
		return "", ""
	}
	return fmt.Sprintf("/sys/block/ublkb%d/queue/io_timeout", s.info.id), strconv.FormatInt(saturatedTimeout.Milliseconds(), 10)
}

// Halt takes the block device away: what is under way is finished, everything after
// that fails for whoever has it open, also what is in the page cache and was not
// flushed. The number stays taken until Stop. When ctx ends first, Halt returns
// kind.Unavailable and goes on by itself, since the kernel cannot be told to stop it;
// call again to wait again.
func (s *Server) Halt(ctx context.Context) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return kind.Errorf(kind.Unavailable, "ublk: halt device %d: closed", s.info.id)
	}
	if s.halting == nil {
		s.halting = make(chan struct{})
		go func() {
			defer close(s.halting)
			s.halted = withControl(func(c *control) error {
				return c.simple(cmdStopDev, s.info.id, "stop device", 0)
			})
		}()
	}
	s.mu.Unlock()
	select {
	case <-s.halting:
		if errors.Is(s.halted, kind.NotFound) { // somebody else deleted it
			return nil
		}
		return s.halted
	case <-ctx.Done():
		return kind.Errorf(kind.Unavailable, "ublk: halt device %d: requests under way do not end: %w", s.info.id, context.Cause(ctx))
	}
}

// Stop takes the device away, as Halt does, and frees its number, for which it waits a
// moment.
func (s *Server) Stop(ctx context.Context) error {
	if err := s.Halt(ctx); err != nil {
		return err
	}
	if err := s.Close(); err != nil {
		return err
	}
	return remove(ctx, s.info.id)
}

// Close stops serving and leaves the device to the next process, which calls Recover:
// until then users of the block device wait. Requests under way, and a Halt that was
// given up, are finished first.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	if s.halting != nil {
		<-s.halting
	}
	s.stopping.Store(true)
	for _, q := range s.queues {
		q.wake()
	}
	if len(s.queues) > 0 {
		<-s.gone
	}
	if s.char >= 0 {
		return unix.Close(s.char)
	}
	return nil
}

// complain logs a failed request, at most one a second.
func (s *Server) complain(op uint32, off, length int64, err error) {
	s.stats.Errors.Add(1)
	now := time.Now().Unix()
	if last := s.lastLog.Load(); last == now || !s.lastLog.CompareAndSwap(last, now) {
		return
	}
	s.log.Error("ublk: a request failed", "device", s.Path(), "op", opName(op), "offset", off, "bytes", length, "error", err)
}
