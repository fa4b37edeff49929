package imagemgmt

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/thaw-project/thaw/keylock"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/statedb"
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
	keys  keylock.Set   // "block \0 user" and disk ids: one call at a time for each
	slots chan struct{} // maxPresents

	mu      sync.Mutex
	blocks  map[string]*entry  // guarded by mu
	writers map[string]*writer // guarded by mu: by disk id
	closed  bool               // guarded by mu
	calls   sync.WaitGroup     // Add under mu while not closed

	// step is called between the steps of an operation; tests stop there.
	step func(name string)
}

var _ Service = (*Manager)(nil)

// entry is a block that is shown, or that somebody is busy with.
type entry struct {
	block Block
	users map[string]struct{} // guarded by Manager.mu
	busy  int                 // guarded by Manager.mu: calls that need the entry to stay
	gate  chan struct{}       // capacity 1: whoever fills it shows or hides the disk
	shown bool                // guarded by Manager.mu; changed only inside the gate
	disk  present.Disk        // guarded by Manager.mu; changed only inside the gate
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
		o: o, db: db, slots: make(chan struct{}, maxPresents),
		blocks: make(map[string]*entry), writers: make(map[string]*writer),
		step: func(string) {},
	}
	if err := m.reconcile(context.Background()); err != nil {
		db.Close()
		return nil, fmt.Errorf("start image-mgmt from %s: %w", o.DBPath, err)
	}
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
	m.mu.Unlock()
	m.calls.Wait()
	return m.db.Close()
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
	return d.Source.Kind == present.SourceQcow2 || d.Source.Kind == present.SourceLvol && d.Source.Lvol == d.ID
}

func (m *Manager) reconcile(ctx context.Context) error {
	readers, writers, err := load(m.db)
	if err != nil {
		return err
	}
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
		m.writers[id] = &writer{writerRecord: w}
	}
	shown, err := m.o.Presenter.List(ctx)
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
			// Whoever had it died between letting go and taking it away.
			if err := m.o.Presenter.Withdraw(ctx, d.ID); err != nil {
				m.o.Logger.Warn("a disk that nobody uses stays", "disk", d.ID, "error", err)
				if d.Source.Kind == present.SourceLvol { // for the next Detach to try again
					e := newEntry(Block{d.Source.Target, d.Source.Lvol})
					e.shown, e.disk = true, d
					m.mu.Lock()
					m.blocks[d.ID] = e
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
			disk, err := m.present(ctx, e.block.Name, e.block, e.block.source(), true)
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
			disk, err := m.present(ctx, id, w.block(), w.source(), false)
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

// present shows source, which is block or over it, in startWait.
func (m *Manager) present(ctx context.Context, id string, block Block, source present.Source, readOnly bool) (present.Disk, error) {
	ctx, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	if err := m.o.Lookup(ctx, block); err != nil {
		return present.Disk{}, err
	}
	return m.o.Presenter.Present(ctx, id, source, readOnly)
}

func (b Block) source() present.Source {
	return present.Source{Kind: present.SourceLvol, Lvol: b.Name, Target: b.Target}
}

func (w *writer) source() present.Source {
	return present.Source{Kind: present.SourceQcow2, Lvol: w.Block, Target: w.Target, Path: w.Path}
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
	if e == nil {
		e = newEntry(block)
		m.blocks[block.Name] = e
	}
	e.busy++
	_, known = e.users[user]
	return e, known
}

// unpin lets go of e. The last to let go of a block that nobody uses takes its disk
// away, for a caller that is gone too.
func (m *Manager) unpin(ctx context.Context, block string, e *entry) error {
	m.mu.Lock()
	for e.busy == 1 && len(e.users) == 0 && e.shown {
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
	gone := e.busy == 0 && len(e.users) == 0 && !e.shown
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
		if ctx.Err() != nil {
			// It may be there or not. Others who want it wait at the gate.
			cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupWait)
			defer cancel()
			if werr := m.withdraw(cleanup, block, 0); werr != nil {
				m.o.Logger.Warn("a disk may be left from a call that gave up", "disk", block, "error", werr)
			}
		}
		return present.Disk{}, err
	}
	m.setShown(e, disk, true)
	return disk, nil
}

func (m *Manager) setShown(e *entry, disk present.Disk, shown bool) {
	m.mu.Lock()
	e.disk, e.shown = disk, shown
	m.mu.Unlock()
}

func (m *Manager) enterGate(ctx context.Context, e *entry) error {
	select {
	case e.gate <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	select {
	case m.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		<-e.gate
		return context.Cause(ctx)
	}
}

func (m *Manager) leaveGate(e *entry) {
	<-m.slots
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
	if !e.shown || len(e.users) > 0 || e.busy > 1 {
		m.mu.Unlock()
		return nil
	}
	disk := e.disk
	e.shown = false // from here on a new Attach waits at the gate
	m.mu.Unlock()
	if err := m.withdraw(ctx, block, hideWait); err != nil {
		m.setShown(e, disk, true)
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
	m.mu.Lock()
	there := m.blocks[block] != nil
	m.mu.Unlock()
	if !there {
		return nil
	}
	e, known := m.pin(Block{Name: block}, user)
	if known {
		if err = m.dropReader(block, user); err == nil {
			m.mu.Lock()
			delete(e.users, user)
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

// AttachWritable implements Service. id must not be the name of a block or of
// another disk.
func (m *Manager) AttachWritable(ctx context.Context, b Block, path, id string) (present.Disk, error) {
	b = m.own(b)
	block := b.Name
	if err := errors.Join(checkBlock(b), checkName("disk", id), checkPath(path)); err != nil {
		return present.Disk{}, kind.Wrap(kind.Invalid, err)
	}
	if block == id {
		return present.Disk{}, kind.Errorf(kind.Invalid, "writable disk %s cannot have the name of its block", id)
	}
	if err := m.enter(); err != nil {
		return present.Disk{}, err
	}
	defer m.calls.Done()
	unlock, err := m.keys.Lock(ctx, id)
	if err != nil {
		return present.Disk{}, fmt.Errorf("attach writable disk %s: %w", id, err)
	}
	defer unlock()
	disk, err := m.attachWritable(ctx, id, writerRecord{Block: block, Target: b.Target, Path: path})
	if err != nil {
		return present.Disk{}, fmt.Errorf("attach writable disk %s over block %s: %w", id, block, err)
	}
	return disk, nil
}

func (m *Manager) attachWritable(ctx context.Context, id string, record writerRecord) (present.Disk, error) {
	m.mu.Lock()
	w, known := m.writers[id]
	if known && (w.block() != record.block() || w.Path != record.Path) {
		m.mu.Unlock()
		return present.Disk{}, kind.Errorf(kind.Exists, "it is there over block %s with %s", w.Block, w.Path)
	}
	if known && w.disk.ID != "" {
		defer m.mu.Unlock()
		return w.disk, nil
	}
	if !known {
		w = &writer{writerRecord: record}
		m.writers[id] = w // before anything else: from here on Attached says so
	}
	m.mu.Unlock()

	disk, err := m.showWritable(ctx, id, w, known)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil {
		if !known {
			delete(m.writers, id)
			m.released(record.block())
		}
		return present.Disk{}, err
	}
	w.disk = disk
	return disk, nil
}

func (m *Manager) showWritable(ctx context.Context, id string, w *writer, known bool) (present.Disk, error) {
	select {
	case m.slots <- struct{}{}:
		defer func() { <-m.slots }()
	case <-ctx.Done():
		return present.Disk{}, context.Cause(ctx)
	}
	if err := m.o.Lookup(ctx, w.block()); err != nil {
		return present.Disk{}, err
	}
	if !known {
		if err := m.putWriter(id, w.writerRecord); err != nil {
			return present.Disk{}, err
		}
		m.step("attach writable: recorded")
	}
	disk, err := m.o.Presenter.Present(ctx, id, w.source(), false)
	if err == nil {
		m.step("attach writable: shown")
		return disk, nil
	}
	if !known {
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupWait)
		defer cancel()
		// kind.Exists means that the disk of this id is somebody else's.
		if !errors.Is(err, kind.Exists) {
			if werr := m.withdraw(cleanup, id, 0); werr != nil {
				m.o.Logger.Warn("a disk may be left from a call that failed", "disk", id, "error", werr)
			}
		}
		if derr := m.dropWriter(id); derr != nil {
			m.o.Logger.Warn("cannot forget a writable disk", "disk", id, "error", derr)
		}
	}
	return present.Disk{}, err
}

// DetachWritable implements Service. While the kernel has the disk open it is
// kind.InUse and nothing changes.
func (m *Manager) DetachWritable(ctx context.Context, block, id string) error {
	if err := errors.Join(checkName("block", block), checkName("disk", id)); err != nil {
		return kind.Wrap(kind.Invalid, err)
	}
	if err := m.enter(); err != nil {
		return err
	}
	defer m.calls.Done()
	unlock, err := m.keys.Lock(ctx, id)
	if err != nil {
		return fmt.Errorf("detach writable disk %s: %w", id, err)
	}
	defer unlock()
	m.mu.Lock()
	w := m.writers[id]
	m.mu.Unlock()
	if w == nil {
		return nil
	}
	if w.Block != block {
		return kind.Errorf(kind.Invalid, "detach writable disk %s: it is over block %s, not %s", id, w.Block, block)
	}
	// Withdraw first: should this process die in between, the record brings the
	// disk back and the caller's next try ends it. The other way round a disk that
	// cannot be taken away would be shown for nobody.
	if err := m.withdraw(ctx, id, hideWait); err != nil {
		return fmt.Errorf("detach writable disk %s: %w", id, err)
	}
	m.mu.Lock()
	w.disk = present.Disk{}
	m.mu.Unlock()
	m.step("detach writable: hidden")
	if err := m.dropWriter(id); err != nil {
		return fmt.Errorf("detach writable disk %s: %w", id, err)
	}
	m.mu.Lock()
	delete(m.writers, id)
	m.mu.Unlock()
	m.released(w.block())
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
	users := make(map[string]struct{})
	for id, w := range m.writers {
		if w.Block == block {
			users[id] = struct{}{}
		}
	}
	a, ok := m.attachmentLocked(block, users)
	if !ok {
		return Attachment{}, kind.Errorf(kind.NotFound, "block %.160s is not attached on this host", block)
	}
	return a, nil
}

// List implements Service.
func (m *Manager) List(context.Context) ([]Attachment, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	users := make(map[string]map[string]struct{}, len(m.blocks)) // by block
	for block := range m.blocks {
		users[block] = make(map[string]struct{})
	}
	for id, w := range m.writers {
		if users[w.Block] == nil {
			users[w.Block] = make(map[string]struct{})
		}
		users[w.Block][id] = struct{}{}
	}
	out := make([]Attachment, 0, len(users))
	for block, u := range users {
		if a, ok := m.attachmentLocked(block, u); ok {
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

// attachmentLocked describes block, adding its readers to users. ok is false when
// there is nothing but a call on its way.
func (m *Manager) attachmentLocked(block string, users map[string]struct{}) (a Attachment, ok bool) {
	a.Block = block
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
