package remote

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme/host"
)

// Timeouts of a link. A link that breaks off without a word is noticed by the keep
// alive after twice its interval; one that is down for seconds is back soon after, since
// attempts to connect are short and close together.
const (
	keepAlive      = 5 * time.Second
	ioTimeout      = 15 * time.Second
	connectTimeout = 3 * time.Second
	reconnectFirst = 100 * time.Millisecond
	reconnectMost  = 2 * time.Second

	// queues of a connection: two, so that many small reads do not wait behind the
	// data of a large one.
	queues = 2
)

// link is the connection to a node's subsystem at a store. It is begun with the first
// block that is read and ends with the last that is attached.
type link struct {
	t      *target
	config host.Config
	cancel context.CancelFunc
	done   chan struct{} // closed when run has ended

	mu      sync.Mutex
	host    *host.Host    // guarded by mu, as are all below; nil until connected once
	changed chan struct{} // closed and replaced when something may be there that was not
	closed  bool
}

func newLink(t *target, rec record) (*link, error) {
	id, err := uuid.Parse(rec.HostID)
	if err != nil {
		return nil, kind.Errorf(kind.Corrupt, "host identifier %.80q is no UUID", rec.HostID)
	}
	addresses := rec.addresses()
	if len(addresses) == 0 {
		return nil, kind.Errorf(kind.Unsupported, "the store has no portal for TCP")
	}
	l := &link{t: t, changed: make(chan struct{}), done: make(chan struct{})}
	l.config = host.Config{
		Portals: addresses, SubNQN: rec.Subsystem, HostNQN: rec.HostNQN, HostID: id, Queues: queues,
		KeepAlive: keepAlive, IOTimeout: ioTimeout, ConnectTimeout: connectTimeout,
		ReconnectDelay: reconnectFirst, ReconnectMax: reconnectMost, LossTimeout: t.o.LossTimeout,
		Changed: l.notify, Log: t.log,
		// The store answers and knows nothing of this node: its attachments were taken
		// away. Reads wait in the host meanwhile, so the sweeper has to find out.
		Refused: func(error) { t.wake(true) },
	}
	ctx, cancel := context.WithCancel(context.Background())
	l.cancel = cancel
	go l.run(ctx) // close waits for it
	return l, nil
}

// run connects for the first time, as often as it takes; then the host reconnects by
// itself.
func (l *link) run(ctx context.Context) {
	defer close(l.done)
	for pause := reconnectFirst; ; pause = min(2*pause, reconnectMost) {
		cctx, cancel := context.WithTimeout(ctx, connectTimeout)
		h, err := host.Connect(cctx, l.config)
		cancel()
		if err == nil {
			l.mu.Lock()
			l.host = h
			l.mu.Unlock()
			l.t.r.metrics.connects.Inc()
			l.notify()
			return
		}
		l.t.log.Warn("cannot connect to the store yet", "portals", l.config.Portals, "again", pause, "error", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

func (l *link) notify() {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.changed)
	l.changed = make(chan struct{})
}

// open returns the device of an nvmeNamespace, or nil and what to wait for.
func (l *link) open(id uuid.UUID) (d *host.Device, connected bool, changed <-chan struct{}, err error) {
	l.mu.Lock()
	h, changed, closed := l.host, l.changed, l.closed
	l.mu.Unlock()
	if closed {
		return nil, false, nil, kind.Errorf(kind.Canceled, "the connection to the store was closed")
	}
	if h == nil {
		return nil, false, changed, nil
	}
	d, err = h.OpenUUID(id)
	if err != nil {
		return nil, true, changed, nil
	}
	return d, true, nil, nil
}

func (l *link) isClosed() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.closed
}

// close ends the connection; reads over it return.
func (l *link) close() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.cancel()
	<-l.done
	l.mu.Lock()
	h := l.host
	l.mu.Unlock()
	if h != nil {
		if err := h.Close(); err != nil {
			l.t.log.Debug("close connection", "error", fmt.Sprint(err))
		}
	}
	l.notify()
}
