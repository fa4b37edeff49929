package ublk

import (
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/uring"
)

// queue serves one hardware queue of a device. The kernel takes commands of a queue
// from one thread only (before Linux 6.16), which is the queue's own.
//
// A request is handled by that thread itself as long as the device answers fast: a
// read from memory then costs one system call and no change of threads. When the
// device takes its time, requests go to workers, so that it never keeps the queue
// waiting; their results come back in done, and an eventfd that the ring reads wakes
// the thread.
type queue struct {
	s     *Server
	id    int
	depth int
	maxIO int

	thread  int // its id, once it runs
	ring    *uring.Ring
	descs   []byte // ioDesc for each tag, written by the kernel
	buffers []byte // maxIO for each tag, and a page for what is read from event

	fetched int // commands that the kernel has
	owned   int // requests that we have
	slow    int // how many requests go to workers before the thread tries again
	score   int // rises by slowWeight with a slow request, falls by 1 with another
	used    bool

	tasks   chan uint16 // tags for workers; holds all there are
	started int         // workers
	workers sync.WaitGroup
	idle    atomic.Int32 // workers that wait for a task

	mu    sync.Mutex
	done  []result // guarded by mu: handled by workers and not yet committed
	event int      // guarded by mu: eventfd, -1 when there is none
	spare []result // the other buffer of done

	sleeping atomic.Bool // the thread waits, or is about to
}

type result struct {
	tag uint16
	res int32
}

const (
	// wakeTag is the user data of the read from event; tags are smaller.
	wakeTag = 1 << 32

	// A request that takes longer than slowTime and slowTimePerByte keeps the queue
	// waiting for longer than handing it to a worker costs. If more than one in
	// slowWeight does, slowRequests go to workers before the thread tries again: a
	// device that got faster is noticed soon, one that is slow costs the queue one wait
	// in that many, and a rare one, of the machine or the device, changes nothing.
	slowTime        = 50 * time.Microsecond
	slowTimePerByte = time.Nanosecond
	slowWeight      = 32
	slowLimit       = 2 * slowWeight
	slowRequests    = 256
	// firstRequests go to workers because nothing is known of the device yet, and the
	// first may have to open something.
	firstRequests = 8

	// idleTime is after how long without a request memory and workers are given back.
	idleTime = 2 * time.Second
	// idleWorkers is how many stay.
	idleWorkers = 1
	// threadPause is between looks whether the queue's thread has ended, which takes
	// microseconds.
	threadPause = 100 * time.Microsecond
	// threadWait bounds that: the thread's number may by then be another's.
	threadWait = 5 * time.Second
	// noTag has a worker end.
	noTag = 0xffff
)

// onOwnThread runs f on a thread that nothing else runs on and that ends with it; the
// channel is closed when f has returned. The process's first thread never ends in Go, so
// it is not used: the kernel wants the thread of a queue gone before another takes over.
func onOwnThread(f func()) (done <-chan struct{}) {
	returned := make(chan struct{})
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			f()
			close(returned)
			return // locked: the thread ends
		}
		elsewhere := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(elsewhere)
			f()
			close(returned)
		}()
		<-elsewhere
		runtime.UnlockOSThread()
	}()
	return returned
}

// run serves until the device is gone or the server stops. It says on ready whether it
// could start. It must be called on a thread that ends with it; end gives back what it
// leaves.
func (q *queue) run(ready chan<- error) {
	q.thread = unix.Gettid()
	err := q.start()
	ready <- err
	if err == nil {
		err = q.loop()
	}
	if err != nil {
		q.s.log.Error("ublk: queue ended", "device", q.s.Path(), "queue", q.id, "error", err)
	}
	q.finish()
}

func (q *queue) start() (err error) {
	fail := func(what string, err error) error {
		return fmt.Errorf("ublk: device %d queue %d: %s: %w", q.s.info.id, q.id, what, err)
	}
	if q.ring, err = uring.New(uring.Options{Entries: uint32(q.depth) + 1, OneThread: true}); err != nil {
		return fail("ring", err)
	}
	q.buffers, err = unix.Mmap(-1, 0, q.depth*q.maxIO+os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_NORESERVE)
	if err != nil {
		return fail("map buffers", err)
	}
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return fail("eventfd", err)
	}
	q.mu.Lock()
	q.event = event
	q.mu.Unlock()
	q.tasks = make(chan uint16, q.depth+maxWorkers)
	q.done, q.spare = make([]result, 0, q.depth), make([]result, 0, q.depth)
	q.slow, q.score = firstRequests, slowLimit-slowWeight+1
	// All commands go in with one system call, which a signal does not split: before
	// Linux 6.16, a process killed with a part of them in the kernel would leave a
	// device that nobody can take over. The descriptors are mapped after that, see
	// startRecovery; no request comes before START_DEV or END_USER_RECOVERY.
	for tag := range q.depth {
		q.command(ioFetch, uint16(tag), 0)
	}
	if err := q.ring.Submit(); err != nil {
		return fail("fetch", err)
	}
	for c, ok := q.ring.Next(); ok; c, ok = q.ring.Next() {
		if c.Res < 0 {
			return fail("fetch", unix.Errno(-c.Res))
		}
	}
	reached("fetched")
	page := os.Getpagesize()
	up := func(n int) int { return (n + page - 1) / page * page }
	q.descs, err = unix.Mmap(q.s.char, int64(q.id*up(maxQueueDepth*ioDescBytes)), up(q.depth*ioDescBytes), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return fail("map descriptors", err)
	}
	q.readEvent()
	return nil
}

// command queues a command for tag.
func (q *queue) command(op uint32, tag uint16, res int32) {
	e := q.ring.SQE() // never nil: there is an entry for each tag
	e.Opcode, e.FD, e.Off, e.UserData = uring.OpUringCmd, int32(q.s.char), uint64(op), uint64(tag)
	cmd := ioCmd{queue: uint16(q.id), tag: tag, result: res, addr: uint64(uintptr(unsafe.Pointer(&q.buffers[int(tag)*q.maxIO])))}
	copy(e.Cmd[:], bytesOf(&cmd))
	q.fetched++
}

// commit answers the request of tag and waits for its next.
func (q *queue) commit(tag uint16, res int32) {
	q.owned--
	q.command(ioCommitAndFetch, tag, res)
}

func (q *queue) readEvent() {
	e := q.ring.SQE()
	e.Opcode, e.FD, e.UserData = uring.OpRead, int32(q.event), wakeTag
	e.Addr, e.Len = uint64(uintptr(unsafe.Pointer(&q.buffers[q.depth*q.maxIO]))), 8
}

func (q *queue) loop() error {
	for {
		q.commitDone()
		if q.fetched == 0 && q.owned == 0 || q.s.stopping.Load() {
			return nil
		}
		timeout := time.Duration(0)
		if q.used {
			timeout = idleTime
		}
		// Who adds to done or sets stopping looks at sleeping afterwards, and we the
		// other way round: one of the two sees the other.
		q.sleeping.Store(true)
		if q.hasDone() || q.s.stopping.Load() {
			q.sleeping.Store(false)
			continue
		}
		err := q.ring.Wait(timeout)
		q.sleeping.Store(false)
		if err != nil {
			return err
		}
		c, ok := q.ring.Next()
		if !ok {
			q.trim()
			continue
		}
		for ; ok; c, ok = q.ring.Next() {
			q.completed(c)
		}
	}
}

func (q *queue) completed(c uring.CQE) {
	if c.UserData == wakeTag {
		q.readEvent()
		return
	}
	q.fetched--
	switch c.Res {
	case resOK:
		q.owned++
		q.used = true
		q.handle(uint16(c.UserData))
	case resAbort: // the device is being stopped
	default:
		q.s.log.Error("ublk: the kernel refused a command", "device", q.s.Path(), "queue", q.id, "tag", c.UserData, "error", unix.Errno(-c.Res))
	}
}

// handle handles the request of tag here, or has a worker do so.
func (q *queue) handle(tag uint16) {
	d := q.desc(tag)
	op := d.opFlags & opMask
	quick := (op == opRead || op == opWrite) && d.opFlags&flagFUA == 0
	switch q.s.o.dispatch {
	case adaptive:
		if quick && q.slow > 0 {
			q.slow--
			quick = false
		}
	case byWorkers:
		quick = false
	}
	if !quick {
		q.hand(tag)
		return
	}
	begin := time.Now()
	res := q.s.handle(d, q.buffer(tag))
	q.judge(time.Since(begin) > slowTime+time.Duration(d.sectors)<<sectorShift*slowTimePerByte)
	q.s.stats.ByQueue.Add(1)
	q.commit(tag, res)
}

// judge takes note of whether a request that the thread handled was slow.
func (q *queue) judge(slow bool) {
	if !slow {
		q.score = max(0, q.score-1)
		return
	}
	q.score += slowWeight
	if q.score > slowLimit {
		q.slow, q.score = slowRequests, slowLimit-slowWeight+1 // the next slow one is enough
	}
}

// desc is the request of tag.
func (q *queue) desc(tag uint16) ioDesc {
	return *(*ioDesc)(unsafe.Pointer(&q.descs[int(tag)*ioDescBytes]))
}

func (q *queue) buffer(tag uint16) []byte {
	return q.buffers[int(tag)*q.maxIO:][:q.maxIO:q.maxIO]
}

// hand gives the request of tag to a worker.
func (q *queue) hand(tag uint16) {
	if len(q.tasks) >= int(q.idle.Load()) && q.started < q.s.o.Workers {
		q.started++
		q.workers.Add(1)
		go q.work()
	}
	q.tasks <- tag // has room for all tags
}

func (q *queue) work() {
	defer q.workers.Done()
	for {
		q.idle.Add(1)
		tag, ok := <-q.tasks
		q.idle.Add(-1)
		if !ok || tag == noTag {
			return
		}
		res := q.s.handle(q.desc(tag), q.buffer(tag))
		q.s.stats.ByWorkers.Add(1)
		q.mu.Lock()
		q.done = append(q.done, result{tag, res})
		q.mu.Unlock()
		if q.sleeping.CompareAndSwap(true, false) {
			q.wake()
		}
	}
}

func (q *queue) hasDone() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.done) > 0
}

// commitDone commits what workers have handled.
func (q *queue) commitDone() {
	q.mu.Lock()
	done := q.done
	q.done, q.spare = q.spare[:0], done
	q.mu.Unlock()
	for _, r := range done {
		q.commit(r.tag, r.res)
	}
}

var wakeValue = []byte{1, 0, 0, 0, 0, 0, 0, 0}

// wake has the thread look around.
func (q *queue) wake() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.event >= 0 {
		unix.Write(q.event, wakeValue)
	}
}

// trim gives back the memory of buffers and the workers that were not needed for a
// while. The kernel copies to a buffer only while this thread is in Wait (see
// uring.Options.OneThread), so with no request here nothing in them is of use.
func (q *queue) trim() {
	if q.owned > 0 {
		return
	}
	q.used = false
	unix.Madvise(q.buffers, unix.MADV_DONTNEED)
	for ; q.started > idleWorkers; q.started-- {
		q.tasks <- noTag
	}
}

// finish waits for what workers have in hand and commits it. What was not committed the
// kernel gives to the next server.
func (q *queue) finish() {
	if q.tasks != nil {
		close(q.tasks)
		q.workers.Wait()
	}
	if q.descs != nil {
		q.commitDone()
		if err := q.ring.Submit(); err != nil {
			q.s.log.Error("ublk: the last results are not committed", "device", q.s.Path(), "queue", q.id, "error", err)
		}
	}
}

// end gives everything back when the queue's thread is gone, and not earlier: if the ring is
// closed while the thread lives, Linux 6.12 ends the commands and hands the thread a last
// request at the same time. That request is never issued again, and the device stays in
// the hands of a kernel worker that waits for it.
func (q *queue) end() {
	for deadline := time.Now().Add(threadWait); unix.Tgkill(unix.Getpid(), q.thread, 0) == nil && time.Now().Before(deadline); {
		time.Sleep(threadPause)
	}
	if q.ring != nil {
		q.ring.Close()
	}
	q.mu.Lock()
	if q.event >= 0 {
		unix.Close(q.event)
		q.event = -1
	}
	q.mu.Unlock()
	for _, m := range [][]byte{q.descs, q.buffers} {
		if m != nil {
			unix.Munmap(m)
		}
	}
}
