package host

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme"
)

// adminDepth is the size of the admin queue, the least that a target must take.
const adminDepth = 32

// controller is one association with a target: an admin queue and I/O queues.
type controller struct {
	c     *Config
	addr  string
	start time.Time
	now   atomic.Int64 // coarse clock for deadlines, ns since start

	admin  *queue
	io     []*queue
	id     nvme.Controller
	cntlid uint16
	depth  int
	max    int // bytes per command
	events chan uint32
	next   atomic.Uint32

	lost    atomic.Pointer[time.Time] // when it first failed
	fencing sync.Mutex
	fenced  bool // guarded by fencing: no command sent to it will be carried out any more
}

// connectController connects the admin queue, enables the controller and connects
// ioQueues I/O queues (Base 3.5.2). The context bounds all of it.
func connectController(ctx context.Context, c *Config, addr, subNQN string, ioQueues int) (ct *controller, err error) {
	ct = &controller{c: c, addr: addr, start: time.Now(), events: make(chan uint32, 4)}
	defer func() {
		if err != nil {
			ct.close()
			if ctx.Err() != nil && kind.Of(err) == "" {
				err = kind.Wrap(kind.Unavailable, err)
			}
			err = fmt.Errorf("connect to %s at %s: %w", subNQN, addr, err)
		}
	}()
	if ct.admin, err = dialQueue(ctx, c, addr, 0, adminDepth-2, &ct.now); err != nil {
		return ct, err
	}
	stop := context.AfterFunc(ctx, func() { ct.admin.fail(context.Cause(ctx)) })
	defer stop()
	ct.admin.onEvent = func(result uint32) {
		select {
		case ct.events <- result:
		default: // the events that wait bring about the same look
		}
	}
	if err = ct.connectQueue(ct.admin, subNQN, nvme.CNTLIDDynamic, adminDepth-1); err != nil {
		return ct, err
	}
	capability, err := ct.property(nvme.PropCAP, true)
	if err != nil {
		return ct, err
	}
	if err = ct.enable(ctx, time.Duration(capability>>nvme.CAPTOShift&0xff)*nvme.CAPTOUnitMs*time.Millisecond); err != nil {
		return ct, err
	}
	b := make([]byte, nvme.IdentifyLen)
	if err = ct.identify(nvme.CNSController, 0, b); err == nil {
		err = ct.id.Parse(b)
	}
	if err != nil {
		return ct, fmt.Errorf("identify controller: %w", err)
	}
	if ct.id.ICDOFF != 0 {
		return ct, kind.Errorf(kind.Unsupported, "in-capsule data at offset %d", ct.id.ICDOFF)
	}
	ct.max = 1 << 20
	if m := ct.id.MDTS; m > 0 && m < 8 {
		ct.max = 1 << (nvme.CAPMPSMINLog + m)
	}
	if ioQueues == 0 {
		return ct, nil
	}
	ct.depth = min(c.Depth, int(capability&nvme.CAPMQESMask)+1)
	if m := int(ct.id.MaxCommands); m > 0 {
		ct.depth = min(ct.depth, m)
	}
	if ct.id.OAES&nvme.OAESNvmeNamespace != 0 {
		if _, err = ct.command(nvme.Command{Opcode: nvme.AdminSetFeatures, CDW10: nvme.FeatAsyncConfig, CDW11: nvme.OAESNvmeNamespace}, none, nil); err != nil {
			return ct, fmt.Errorf("configure asynchronous events: %w", err)
		}
		ct.admin.await()
	}
	n := uint32(ioQueues - 1)
	cqe, err := ct.command(nvme.Command{Opcode: nvme.AdminSetFeatures, CDW10: nvme.FeatQueues, CDW11: n<<16 | n}, none, nil)
	if err != nil {
		return ct, fmt.Errorf("ask for %d queues: %w", ioQueues, err)
	}
	ioQueues = min(ioQueues, int(min(uint32(cqe.Result)&0xffff, uint32(cqe.Result)>>16))+1)
	for i := range ioQueues {
		q, err := dialQueue(ctx, c, addr, uint16(i+1), ct.depth-1, &ct.now)
		if err != nil {
			return ct, err
		}
		ct.io = append(ct.io, q)
		stop := context.AfterFunc(ctx, func() { q.fail(context.Cause(ctx)) })
		err = ct.connectQueue(q, subNQN, ct.cntlid, ct.depth-1)
		stop()
		if err != nil {
			return ct, err
		}
		if q.inCap = int(ct.id.CapsuleSize)*16 - nvme.SQELen; q.inCap < 0 || c.NoInCapsule {
			q.inCap = 0
		}
	}
	return ct, nil
}

func (ct *controller) connectQueue(q *queue, subNQN string, cntlid uint16, sqsize int) error {
	f := nvme.Connect{QID: q.qid, SQSize: uint16(sqsize), Attr: nvme.ConnectNoFlowControl}
	if q.qid == 0 {
		f.KeepAlive = uint32(ct.c.KeepAlive / time.Millisecond)
	}
	var cmd nvme.Command
	f.Put(&cmd)
	data := make([]byte, nvme.ConnectDataLen)
	(&nvme.ConnectData{HostID: ct.c.HostID, CNTLID: cntlid, SubNQN: subNQN, HostNQN: ct.c.HostNQN}).Put(data)
	cqe, err := q.do(&cmd, toTarget, data)
	if err == nil {
		err = cqe.Status.Err()
	}
	if err != nil {
		return fmt.Errorf("connect queue %d: %w", q.qid, err)
	}
	if auth := uint32(cqe.Result) >> 16; auth != 0 {
		return kind.Errorf(kind.Unsupported, "connect queue %d: target wants authentication (%#x)", q.qid, auth)
	}
	ct.cntlid = uint16(cqe.Result)
	return nil
}

// command runs an admin command and turns its status into an error.
func (ct *controller) command(cmd nvme.Command, dir direction, data []byte) (nvme.Completion, error) {
	cqe, err := ct.admin.do(&cmd, dir, data)
	if err == nil {
		err = cqe.Status.Err()
	}
	return cqe, err
}

func (ct *controller) property(off uint32, eight bool) (uint64, error) {
	cqe, err := ct.command(nvme.PropertyGet(off, eight), none, nil)
	if err != nil {
		return 0, fmt.Errorf("get property %#x: %w", off, err)
	}
	return cqe.Result, nil
}

// readyPoll is how often CSTS is looked at while a controller gets ready.
const readyPoll = 10 * time.Millisecond

func (ct *controller) enable(ctx context.Context, within time.Duration) error {
	cc := uint32(nvme.CCEnable | nvme.SQELog2<<nvme.CCIOSQESShift | nvme.CQELog2<<nvme.CCIOCQESShift)
	if _, err := ct.command(nvme.PropertySet(nvme.PropCC, cc), none, nil); err != nil {
		return fmt.Errorf("enable controller: %w", err)
	}
	for begin := time.Now(); ; {
		v, err := ct.property(nvme.PropCSTS, false)
		switch {
		case err != nil:
			return err
		case v&nvme.CSTSFatal != 0:
			return kind.Errorf(kind.IO, "controller reports a fatal status")
		case v&nvme.CSTSReady != 0:
			return nil
		case time.Since(begin) > max(within, time.Second):
			return kind.Errorf(kind.Unavailable, "controller is not ready after %v", within)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(readyPoll):
		}
	}
}

func (ct *controller) identify(cns uint8, nsid uint32, b []byte) error {
	_, err := ct.command(nvme.Command{Opcode: nvme.AdminIdentify, NSID: nsid, CDW10: uint32(cns)}, toHost, b)
	return err
}

// scan lists the nvmeNamespaces of the controller.
func (ct *controller) scan() ([]NvmeNamespace, error) {
	b := make([]byte, nvme.IdentifyLen)
	var ids []uint32
	for last := uint32(0); ; {
		if err := ct.identify(nvme.CNSActiveList, last, b); err != nil {
			return nil, fmt.Errorf("list nvmeNamespaces: %w", err)
		}
		n := len(ids)
		if ids = nvme.ParseList(b, ids); len(ids)-n < nvme.MaxList || len(ids) >= maxNvmeNamespaces {
			break
		}
		if ids[len(ids)-1] <= last {
			return nil, kind.Errorf(kind.Invalid, "list nvmeNamespaces: the list does not ascend")
		}
		last = ids[len(ids)-1]
	}
	var all []NvmeNamespace
	for _, id := range ids {
		n := NvmeNamespace{NSID: id}
		var d nvme.Descriptors
		err := ct.identify(nvme.CNSNvmeNamespace, id, b)
		if err == nil && binary.LittleEndian.Uint64(b) == 0 {
			continue // detached since it was listed: all is zero, its size as well
		}
		if err == nil {
			err = n.id.Parse(b)
		}
		if err == nil {
			if err = ct.identify(nvme.CNSDescriptors, id, b); err == nil {
				err = d.Parse(b)
			}
		}
		switch {
		case errors.Is(err, errPath):
			return nil, err
		case errors.Is(err, kind.NotFound):
			continue
		case err != nil:
			ct.c.Log.Warn("nvmeNamespace is left out", "controller", ct.addr, "nsid", id, "err", err)
			continue
		}
		n.NGUID, n.EUI64, n.UUID = n.id.NGUID, n.id.EUI64, d.UUID
		if d.NGUID != [16]byte{} {
			n.NGUID = d.NGUID
		}
		if n.UUID == uuid.Nil {
			n.UUID = n.NGUID
		}
		n.SizeBytes, n.BlockBytes, n.ReadOnly = int64(n.id.Blocks)*int64(n.id.BlockBytes), n.id.BlockBytes, n.id.ReadOnly
		all = append(all, n)
	}
	return all, nil
}

// queue picks the I/O queue for a command.
func (ct *controller) queue() *queue {
	if len(ct.io) == 1 {
		return ct.io[0]
	}
	return ct.io[ct.next.Add(1)%uint32(len(ct.io))]
}

// fail ends all queues.
func (ct *controller) fail(err error) {
	now := time.Now()
	ct.lost.CompareAndSwap(nil, &now)
	if ct.admin != nil {
		ct.admin.fail(err)
	}
	for _, q := range ct.io {
		q.fail(err)
	}
}

// close ends all queues and waits for them.
func (ct *controller) close() {
	ct.fail(errors.New("controller closes"))
	for _, q := range ct.io {
		q.close()
	}
	if ct.admin != nil {
		ct.admin.close()
	}
}

// shutdown tells the target that the host leaves, as far as it listens, and closes.
func (ct *controller) shutdown() {
	t := time.AfterFunc(shutdownWait, func() { ct.admin.fail(errors.New("shutdown is not answered")) })
	_, _ = ct.command(nvme.PropertySet(nvme.PropCC, nvme.CCEnable|nvme.CCSHNNormal|nvme.SQELog2<<nvme.CCIOSQESShift|nvme.CQELog2<<nvme.CCIOCQESShift), none, nil)
	t.Stop()
	ct.close()
}

// shutdownWait bounds the farewell.
const shutdownWait = 2 * time.Second

// look reads the list of changed nvmeNamespaces, which lets the target report the next
// change, and calls changed.
func (ct *controller) look(changed func() error) error {
	b := make([]byte, nvme.LogChangedLen)
	if _, err := ct.command(nvme.GetLogPage(nvme.LogChanged, nvme.NSIDAll, 0, len(b), false), toHost, b); err != nil {
		return err
	}
	return changed()
}

// watch looks after a connected controller until it fails or ctx ends: deadlines,
// keep alive, events. It returns why.
func (ct *controller) watch(ctx context.Context, changed func() error) error {
	tick := ct.c.IOTimeout / 8
	if ct.c.KeepAlive > 0 {
		tick = min(tick, ct.c.KeepAlive/4)
	}
	tick = max(min(tick, 500*time.Millisecond), 5*time.Millisecond)
	t := time.NewTicker(tick)
	defer t.Stop()
	// What waits for an answer of the target runs beside this loop, which looks at
	// deadlines.
	alive, looked := make(chan error, 1), make(chan error, 1)
	events := ct.events // nil while one is looked at
	busy := false
	defer func() {
		if busy || events == nil {
			ct.admin.fail(errors.New("path ends"))
		}
		if busy {
			<-alive
		}
		if events == nil {
			<-looked
		}
	}()
	var watchers sync.WaitGroup
	stop := make(chan struct{})
	defer watchers.Wait()
	defer close(stop)
	for _, q := range ct.io {
		watchers.Add(1)
		go func() {
			defer watchers.Done()
			select {
			case <-q.dead:
				ct.admin.fail(fmt.Errorf("queue %d: %w", q.qid, q.err))
			case <-stop:
			}
		}()
	}
	sent := time.Now()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ct.admin.dead:
			return ct.admin.err
		case err := <-alive:
			if busy = false; err != nil && !errors.Is(err, errPath) {
				return fmt.Errorf("keep alive: %w", err)
			}
		case result := <-events:
			ct.admin.await()
			if result != nvme.EventNvmeNamespace {
				continue
			}
			events = nil
			go func() { looked <- ct.look(changed) }()
		case err := <-looked:
			if events = ct.events; err != nil {
				return fmt.Errorf("look at changed nvmeNamespaces: %w", err)
			}
		case <-t.C:
			now := int64(time.Since(ct.start))
			ct.now.Store(now)
			for _, q := range ct.io {
				q.check(now, ct.c.IOTimeout)
			}
			limit := ct.c.IOTimeout
			if ct.c.KeepAlive > 0 {
				// A target that does not answer Keep Alive is gone.
				limit = min(limit, ct.c.KeepAlive)
			}
			ct.admin.check(now, limit)
			if ct.c.KeepAlive > 0 && !busy && time.Since(sent) >= ct.c.KeepAlive/2 {
				busy, sent = true, time.Now()
				go func() {
					_, err := ct.command(nvme.Command{Opcode: nvme.AdminKeepAlive}, none, nil)
					alive <- err
				}()
			}
		}
	}
}
