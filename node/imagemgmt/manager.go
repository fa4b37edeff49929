package imagemgmt

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/thaw-project/thaw/failpoint"
	"github.com/thaw-project/thaw/keylock"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/statedb"
	"github.com/thaw-project/thaw/target/bdev"
)

const (
	// maxPresents bounds how many disks are being shown or taken away at once:
	// enough to hide the storage side's latency, few enough not to swamp it.
	maxPresents = 16

	// hideWait is how long the last user's Detach waits for a kernel that still
	// has the disk open: a loop device detaches itself a moment after the unmount.
	hideWait = 3 * time.Second

	// startWait bounds what a start waits for a storage side that is away, so that a
	// node comes up without it.
	startWait = 10 * time.Second

	// cleanupWait bounds what is undone for a caller that is gone.
	cleanupWait = 10 * time.Second

	// tendFirst and tendMost are the pauses before disks in doubt are looked at again.
	tendFirst = 250 * time.Millisecond
	tendMost  = 30 * time.Second
)

// Options says what a Manager works with.
type Options struct {
	// Presenter shows disks. Disks of blocks have the block's name as id.
	Presenter present.Presenter
	// DBPath is the database, imagemgmt.db.
	DBPath string
	// Own is the name by which annotations call this machine's own store, so that both
	// that name and none mean the same; empty when there is none.
	Own string
	// Lookup makes the storage side let this machine open a block: nil, kind.NotFound,
	// or kind.Unavailable when it does not answer. For one that it let us open before
	// it need not ask again.
	Lookup func(ctx context.Context, block Block) error
	// Layers makes writable layers; nil keeps them as qcow2 files on this host, over what
	// Open opens.
	Layers Layers
	// Open opens blocks that Lookup has let us open, to learn the size of what a writable
	// layer is over; nil where this machine does not read blocks itself.
	Open present.Opener
	// Cached opens a block for Prefetch: what is read from the device must be kept. Its error
	// is Prefetch's, kind.Unsupported for a block that nothing keeps; nil is that for all.
	Cached func(block Block) (bdev.Device, error)
	// Scratch is EnsureScratch; nil is kind.Unsupported.
	Scratch func(ctx context.Context, target string, sizeBytes int64) (Block, error)
	// Released, if set, is told that a block may no longer be used here: Uses says. It
	// must not block, nor call the Manager.
	Released func(block Block)
	Logger   *slog.Logger     // nil is silence
	Now      func() time.Time // nil is time.Now
}

// Manager is the Service of one host.
type Manager struct {
	o     Options
	db    *statedb.DB
	files bool          // layers are files of this host
	keys  keylock.Set   // "block \0 user" and disk ids: one call at a time for each
	slots chan struct{} // maxPresents

	prefetches chan struct{} // maxPrefetches
	reads      chan struct{} // prefetchReads

	mu      sync.Mutex
	blocks  map[string]*entry      // guarded by mu
	writers map[string]*writer     // guarded by mu: by disk id
	layers  map[string]layerRecord // guarded by mu: by disk id
	busy    int                    // guarded by mu: how many slots are taken
	idle    chan struct{}          // guarded by mu: closed when none is; nil while none is
	closed  bool                   // guarded by mu
	calls   sync.WaitGroup         // Add under mu while not closed

	doubts chan struct{} // capacity 1: some entry is in doubt
	cancel context.CancelFunc
	wg     sync.WaitGroup // the tender

	// step is called between the steps of an operation; tests stop there.
	step func(name string)
}

var _ Service = (*Manager)(nil)

// entry is a block that is shown, or that somebody is busy with.
type entry struct {
	block Block // changed only while nobody has it pinned
	// guessed means that block's target is not known: a presenter need not know it.
	guessed bool
	users   map[string]struct{} // guarded by Manager.mu
	busy    int                 // guarded by Manager.mu: calls that need the entry to stay
	gate    chan struct{}       // capacity 1: whoever fills it shows or hides the disk
	shown   bool                // guarded by Manager.mu; changed only inside the gate
	// doubt means that a disk may be there although shown says no, or that one with no user
	// could not be taken away: who presents it was not reached.
	doubt bool         // guarded by Manager.mu; changed only inside the gate
	disk  present.Disk // guarded by Manager.mu; changed only inside the gate
	// prefetches are to end with the last user; guarded by Manager.mu.
	prefetches map[*context.CancelCauseFunc]struct{}
}

// writer is a writable disk over a block.
type writer struct {
	writerRecord
	disk present.Disk // guarded by Manager.mu: zero until shown
}

// New opens the database and makes what is shown agree with what is recorded: disks
// that are recorded and missing (after a reboot, all) are shown, disks of ours that
// nobody has recorded are taken away. A disk that cannot be shown now is logged, and
// shown by the next Attach.
func New(o Options) (*Manager, error) {
	if o.Presenter == nil || o.Lookup == nil || o.DBPath == "" {
		return nil, kind.Errorf(kind.Invalid, "image-mgmt needs a presenter, a lookup and a database path")
	}
	files := o.Layers == nil
	if files {
		o.Layers = fileLayers{o.Lookup, o.Open}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	db, err := openDB(o.DBPath)
	if err != nil {
		return nil, err
	}
	m := &Manager{
		o: o, db: db, files: files, slots: make(chan struct{}, maxPresents),
		prefetches: make(chan struct{}, maxPrefetches), reads: make(chan struct{}, prefetchReads),
		blocks: make(map[string]*entry), writers: make(map[string]*writer), doubts: make(chan struct{}, 1),
		step: func(name string) { failpoint.Reach("imagemgmt." + name) },
	}
	if err := m.reconcile(context.Background()); err != nil {
		db.Close()
		return nil, fmt.Errorf("start image-mgmt from %s: %w", o.DBPath, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	m.cancel = cancel
	m.wg.Go(func() { m.tend(ctx) })
	return m, nil
}

// Close waits for calls and closes the database. Disks stay shown.
func (m *Manager) Close() error {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil
	}
	m.closed = true
	for _, e := range m.blocks {
		e.endPrefetches(kind.Errorf(kind.Unavailable, "image-mgmt is stopping"))
	}
	m.mu.Unlock()
	m.cancel()
	m.wg.Wait()
	m.calls.Wait()
	return m.db.Close()
}

// tend takes away disks of which it is not known whether they are there, until it is.
func (m *Manager) tend(ctx context.Context) {
	for pause := tendFirst; ; {
		select {
		case <-ctx.Done():
			return
		case <-m.doubts:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		doubtful := make(map[string]*entry)
		m.mu.Lock()
		for name, e := range m.blocks {
			if e.doubt {
				doubtful[name] = e
			}
		}
		m.mu.Unlock()
		pause = min(2*pause, tendMost)
		failed := false
		for name, e := range doubtful {
			if ctx.Err() != nil {
				return // who looks next is the next start
			}
			m.mu.Lock()
			still := m.blocks[name] == e && e.doubt && e.busy == 0 // else whoever has it looks
			if still {
				e.busy++
			}
			m.mu.Unlock()
			if !still {
				continue
			}
			if err := m.unpin(ctx, name, e); err != nil {
				m.o.Logger.Warn("a disk that nobody uses stays", "disk", name, "again", pause, "error", err)
				failed = true
				m.lookAgain()
			}
		}
		if !failed {
			pause = tendFirst
		}
	}
}

// doubtLocked has tend look; the caller holds m.mu.
func (m *Manager) doubtLocked(e *entry) {
	e.doubt = true
	m.lookAgain()
}

func (m *Manager) lookAgain() {
	select {
	case m.doubts <- struct{}{}:
	default:
	}
}

func (e *entry) endPrefetches(cause error) {
	for cancel := range e.prefetches {
		(*cancel)(cause)
	}
}

func (m *Manager) enter() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return kind.Errorf(kind.Unavailable, "image-mgmt is stopping")
	}
	m.calls.Add(1)
	return nil
}

// ours tells the disks of this package from others that the presenter shows.
func ours(d present.Disk) bool {
	return d.Source.Kind == present.SourceQcow2 || d.Source.Kind == present.SourceWritable || d.Source.Kind == present.SourceLvol && d.Source.Lvol == d.ID
}

func (m *Manager) reconcile(ctx context.Context) error {
	readers, writers, layers, err := load(m.db)
	if err != nil {
		return err
	}
	m.layers = layers
	entries := make(map[string]*entry, len(readers))
	for block, users := range readers {
		e := entries[block.Name]
		if e == nil {
			e = newEntry(block)
			entries[block.Name], m.blocks[block.Name] = e, e
		}
		for _, u := range users {
			e.users[u] = struct{}{}
		}
	}
	for id, w := range writers {
		if !m.files {
			w.Path = "" // of records from before it was ignored
		}
		m.writers[id] = &writer{writerRecord: w}
	}
	lctx, cancel := context.WithTimeout(ctx, startWait)
	shown, err := m.o.Presenter.List(lctx)
	cancel()
	if err != nil {
		return fmt.Errorf("list presented disks: %w", err)
	}
	var g errgroup.Group
	g.SetLimit(maxPresents)
	for _, d := range shown {
		if !ours(d) || entries[d.ID] != nil || m.writers[d.ID] != nil {
			continue
		}
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, startWait)
			defer cancel()
			// Whoever had it died between letting go and taking it away.
			if err := m.o.Presenter.Withdraw(ctx, d.ID); err != nil {
				m.o.Logger.Warn("a disk that nobody uses stays", "disk", d.ID, "error", err)
				if d.Source.Kind == present.SourceLvol { // for the next Detach to try again
					e := newEntry(Block{d.Source.Target, d.Source.Lvol})
					e.guessed = e.block.Target == ""
					m.mu.Lock()
					m.blocks[d.ID] = e
					if errors.Is(err, kind.InUse) {
						e.shown, e.disk = true, d
					} else {
						m.doubtLocked(e) // it may go yet: who wants it has it shown again
					}
					m.mu.Unlock()
				}
			} else {
				m.o.Logger.Info("took a disk away that nobody uses", "disk", d.ID)
			}
			return nil
		})
	}
	for _, e := range entries {
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, startWait)
			defer cancel()
			err := m.o.Lookup(ctx, e.block)
			var disk present.Disk
			if err == nil {
				disk, err = m.o.Presenter.Present(ctx, e.block.Name, e.block.source(), true)
			}
			if err != nil {
				m.o.Logger.Error("cannot show a block that is in use", "block", e.block.Name, "target", e.block.Target, "error", err)
				return nil
			}
			m.mu.Lock()
			e.shown, e.disk = true, disk
			m.mu.Unlock()
			return nil
		})
	}
	for id, w := range m.writers {
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, startWait)
			defer cancel()
			disk, err := m.presentLayer(ctx, id, w.layer())
			if err != nil {
				m.o.Logger.Error("cannot show a writable layer that is in use", "disk", id, "path", w.Path, "error", err)
				return nil
			}
			m.mu.Lock()
			w.disk = disk
			m.mu.Unlock()
			return nil
		})
	}
	return g.Wait()
}

func newEntry(block Block) *entry {
	return &entry{block: block, users: make(map[string]struct{}), gate: make(chan struct{}, 1)}
}

func (b Block) source() present.Source {
	return present.Source{Kind: present.SourceLvol, Lvol: b.Name, Target: b.Target}
}

// ownLayer is own for a layer's block, and drops a path that means nothing here.
func (m *Manager) ownLayer(l Layer) (Layer, error) {
	l.Block = m.own(l.Block)
	if !m.files {
		l.Path = ""
	} else if err := checkPath(l.Path); err != nil {
		return l, err
	}
	return l, checkLayer(l)
}

// own gives this machine's own store its one name.
func (m *Manager) own(b Block) Block {
	if b.Target == m.o.Own {
		b.Target = ""
	}
	return b
}

func (m *Manager) released(b Block) {
	if m.o.Released != nil {
		m.o.Released(b)
	}
}

// Attach implements Service. Callers of one block share one presentation; a caller
// that gives up leaves it to the others and is no user.
func (m *Manager) Attach(ctx context.Context, b Block, user string) (present.Disk, error) {
	b = m.own(b)
	if err := errors.Join(checkBlock(b), checkUser(user)); err != nil {
		return present.Disk{}, kind.Wrap(kind.Invalid, err)
	}
	block := b.Name
	if err := m.enter(); err != nil {
		return present.Disk{}, err
	}
	defer m.calls.Done()
	unlock, err := m.keys.Lock(ctx, string(readerKey(block, user)))
	if err != nil {
		return present.Disk{}, fmt.Errorf("attach block %s: %w", block, err)
	}
	defer unlock()

	e, known := m.pin(b, user)
	disk, err := m.attach(ctx, block, user, e, known)
	if err != nil && !known {
		if derr := m.dropReader(block, user); derr != nil {
			m.o.Logger.Warn("cannot forget who wanted a block", "block", block, "user", user, "error", derr)
		}
	}
	if uerr := m.unpin(ctx, block, e); uerr != nil {
		m.o.Logger.Warn("a disk that nobody uses stays", "disk", block, "error", uerr)
	}
	if err != nil {
		return present.Disk{}, fmt.Errorf("attach block %s: %w", block, err)
	}
	return disk, nil
}

func (m *Manager) attach(ctx context.Context, block, user string, e *entry, known bool) (present.Disk, error) {
	if !known {
		if err := m.putReader(e.block, user); err != nil {
			return present.Disk{}, err
		}
		m.step("attach: recorded")
	}
	disk, err := m.show(ctx, block, e)
	if err != nil {
		return present.Disk{}, err
	}
	m.step("attach: shown")
	if !known {
		m.mu.Lock()
		e.users[user] = struct{}{}
		m.mu.Unlock()
	}
	return disk, nil
}

// pin returns block's entry, which stays until unpin, and whether user uses it.
func (m *Manager) pin(block Block, user string) (e *entry, known bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e = m.blocks[block.Name]
	switch {
	case e == nil:
		e = newEntry(block)
		m.blocks[block.Name] = e
	case e.busy == 0 && len(e.users) == 0 && (e.guessed || !e.shown):
		// A disk that is shown reads from the target that it has: Uses must not forget that.
		if e.block != block {
			m.released(e.block)
		}
		e.block, e.guessed = block, false
	}
	e.busy++
	_, known = e.users[user]
	return e, known
}

// pinThere is pin for a block whose entry there is; else e is nil.
func (m *Manager) pinThere(block, user string) (e *entry, known bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e = m.blocks[block]; e == nil {
		return nil, false
	}
	e.busy++
	_, known = e.users[user]
	return e, known
}

// unpin lets go of e. The last to let go of a block that nobody uses takes its disk
// away, for a caller that is gone too.
func (m *Manager) unpin(ctx context.Context, block string, e *entry) error {
	m.mu.Lock()
	for e.busy == 1 && len(e.users) == 0 && (e.shown || e.doubt) {
		m.mu.Unlock()
		// The use has ended: the caller's impatience must not leave the disk.
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupWait)
		err := m.hide(cleanup, block, e)
		cancel()
		m.mu.Lock()
		if err != nil {
			e.busy--
			m.mu.Unlock()
			return err
		}
	}
	e.busy--
	gone := e.busy == 0 && len(e.users) == 0 && !e.shown && !e.doubt
	if gone {
		delete(m.blocks, block)
	}
	m.mu.Unlock()
	if gone {
		m.released(e.block)
	}
	return nil
}

// show shows the block's disk unless it is shown. The caller has pinned e, so a disk
// seen shown stays.
func (m *Manager) show(ctx context.Context, block string, e *entry) (present.Disk, error) {
	m.mu.Lock()
	if e.shown {
		defer m.mu.Unlock()
		return e.disk, nil
	}
	m.mu.Unlock()
	if err := m.enterGate(ctx, e); err != nil {
		return present.Disk{}, err
	}
	defer m.leaveGate(e)
	m.mu.Lock()
	shown, disk := e.shown, e.disk
	m.mu.Unlock()
	if shown {
		return disk, nil
	}
	if err := m.o.Lookup(ctx, e.block); err != nil {
		return present.Disk{}, err
	}
	disk, err := m.o.Presenter.Present(ctx, block, e.block.source(), true)
	if err != nil {
		if unclear(ctx, err) {
			// It may be there or not. Whoever lets go of it last takes it away.
			m.mu.Lock()
			m.doubtLocked(e)
			m.mu.Unlock()
		}
		return present.Disk{}, err
	}
	m.setShown(e, disk, true)
	return disk, nil
}

// unclear tells whether a call that failed may have taken effect all the same: it was
// given up, or its answer was lost.
func unclear(ctx context.Context, err error) bool {
	return ctx.Err() != nil || errors.Is(err, kind.Unavailable) || errors.Is(err, kind.Canceled)
}

func (m *Manager) setShown(e *entry, disk present.Disk, shown bool) {
	m.mu.Lock()
	e.disk, e.shown, e.doubt = disk, shown, false
	m.mu.Unlock()
}

// takeSlot bounds what goes on at once.
func (m *Manager) takeSlot(ctx context.Context) error {
	m.mu.Lock()
	if m.busy++; m.idle == nil {
		m.idle = make(chan struct{})
	}
	m.mu.Unlock()
	select {
	case m.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		m.notBusy()
		return context.Cause(ctx)
	}
}

func (m *Manager) leaveSlot() {
	<-m.slots
	m.notBusy()
}

func (m *Manager) notBusy() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.busy--; m.busy == 0 {
		close(m.idle)
		m.idle = nil
	}
}

func (m *Manager) enterGate(ctx context.Context, e *entry) error {
	select {
	case e.gate <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if err := m.takeSlot(ctx); err != nil {
		<-e.gate
		return err
	}
	return nil
}

func (m *Manager) leaveGate(e *entry) {
	m.leaveSlot()
	<-e.gate
}

// hide takes the block's disk away unless somebody else came to want it. The caller
// has pinned e.
func (m *Manager) hide(ctx context.Context, block string, e *entry) error {
	if err := m.enterGate(ctx, e); err != nil {
		return err
	}
	defer m.leaveGate(e)
	m.mu.Lock()
	if !e.shown && !e.doubt || len(e.users) > 0 || e.busy > 1 {
		m.mu.Unlock()
		return nil
	}
	disk, shown := e.disk, e.shown
	e.shown = false // from here on a new Attach waits at the gate
	m.mu.Unlock()
	if err := m.withdraw(ctx, block, hideWait); err != nil {
		inUse := errors.Is(err, kind.InUse)
		m.setShown(e, disk, shown && inUse)
		if !shown || !inUse {
			m.mu.Lock()
			m.doubtLocked(e)
			m.mu.Unlock()
		}
		return err
	}
	m.setShown(e, present.Disk{}, false)
	return nil
}

// withdraw takes disk id away, retrying for wait while the kernel has it open.
func (m *Manager) withdraw(ctx context.Context, id string, wait time.Duration) error {
	deadline := time.Now().Add(wait)
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		err := m.o.Presenter.Withdraw(ctx, id)
		if err == nil || !errors.Is(err, kind.InUse) || time.Until(deadline) < pause {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return err
		}
	}
}

// Detach implements Service. A disk that the kernel still has open after a few
// seconds stays shown with no user, and the error is kind.InUse: user is released in
// any case, and the next Detach of the block tries again to take the disk away.
func (m *Manager) Detach(ctx context.Context, block, user string) error {
	if err := errors.Join(checkName("block", block), checkUser(user)); err != nil {
		return kind.Wrap(kind.Invalid, err)
	}
	if err := m.enter(); err != nil {
		return err
	}
	defer m.calls.Done()
	unlock, err := m.keys.Lock(ctx, string(readerKey(block, user)))
	if err != nil {
		return fmt.Errorf("detach block %s: %w", block, err)
	}
	defer unlock()
	// An entry of its own would have no target, for those to attach who come meanwhile.
	e, known := m.pinThere(block, user)
	if e == nil {
		return nil
	}
	if known {
		if err = m.dropReader(block, user); err == nil {
			m.mu.Lock()
			delete(e.users, user)
			if len(e.users) == 0 {
				e.endPrefetches(kind.Errorf(kind.Canceled, "nobody uses the block any more"))
			}
			m.mu.Unlock()
			m.step("detach: forgotten")
		}
	}
	if uerr := m.unpin(ctx, block, e); err == nil {
		err = uerr
	}
	if err != nil {
		return fmt.Errorf("detach block %s: %w", block, err)
	}
	m.step("detach: hidden")
	return nil
}

// Attached tells whether anybody on this host uses block of its own store or is about
// to: as a disk, or under a writable layer.
func (m *Manager) Attached(block string) bool { return m.Uses(Block{Name: block}) }

// Uses is Attached for the block of any target.
func (m *Manager) Uses(b Block) bool {
	b = m.own(b)
	m.mu.Lock()
	defer m.mu.Unlock()
	if e := m.blocks[b.Name]; e != nil && e.block.Target == b.Target {
		return true
	}
	for _, w := range m.writers {
		if w.block() == b {
			return true
		}
	}
	return false
}

// Layered tells whether a writable layer is over b.
func (m *Manager) Layered(b Block) bool {
	b = m.own(b)
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, w := range m.writers {
		if w.block() == b {
			return true
		}
	}
	return false
}

// Stat implements Service. Disk is zero when the block is held only by writable
// layers, or could not be shown.
func (m *Manager) Stat(_ context.Context, block string) (Attachment, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var layers []present.Disk
	for id, w := range m.writers {
		if w.Block == block {
			layers = append(layers, w.diskLocked(id))
		}
	}
	a, ok := m.attachmentLocked(block, layers)
	if !ok {
		return Attachment{}, kind.Errorf(kind.NotFound, "block %.160s is not attached on this host", block)
	}
	return a, nil
}

// List implements Service.
func (m *Manager) List(context.Context) ([]Attachment, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	layers := make(map[string][]present.Disk, len(m.blocks)) // by block
	for block := range m.blocks {
		layers[block] = nil
	}
	for id, w := range m.writers {
		layers[w.Block] = append(layers[w.Block], w.diskLocked(id))
	}
	out := make([]Attachment, 0, len(layers))
	for block, over := range layers {
		if a, ok := m.attachmentLocked(block, over); ok {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, func(a, b Attachment) int {
		if a.Block < b.Block {
			return -1
		}
		return 1
	})
	return out, nil
}

// attachmentLocked describes block, over which layers are. ok is false when there is
// nothing but a call on its way.
func (m *Manager) attachmentLocked(block string, layers []present.Disk) (a Attachment, ok bool) {
	slices.SortFunc(layers, func(a, b present.Disk) int { return strings.Compare(a.ID, b.ID) })
	a.Block, a.Layers = block, layers
	users := make(map[string]struct{})
	for _, d := range layers {
		users[d.ID] = struct{}{}
	}
	if e := m.blocks[block]; e != nil {
		for u := range e.users {
			users[u] = struct{}{}
		}
		if e.shown {
			a.Disk, ok = e.disk, true
		}
	}
	a.Users = make([]string, 0, len(users))
	for u := range users {
		a.Users = append(a.Users, u)
	}
	slices.Sort(a.Users)
	return a, ok || len(users) > 0
}
