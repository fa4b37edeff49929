package card

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"go.etcd.io/bbolt"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/identity"
	"github.com/thaw-project/thaw/kind"
)

// steps measures an operation and says where it is.
type steps struct {
	c     *Card
	of    string // the operation
	last  time.Time
	taken []*attacherv1.StepTime
}

func (c *Card) begin(operation string) *steps {
	return &steps{c: c, of: operation, last: time.Now()}
}

// done says that a step was made.
func (s *steps) done(name string) {
	now := time.Now()
	took := now.Sub(s.last)
	s.taken = append(s.taken, &attacherv1.StepTime{Step: name, Nanos: took.Nanoseconds()})
	s.c.metrics.steps.WithLabelValues(s.of, name).Observe(took.Seconds())
	s.c.step("card." + s.of + ": " + name)
	s.last = time.Now()
}

// AttachDisk implements attacherv1.CardServer.
func (c *Card) AttachDisk(ctx context.Context, r *attacherv1.AttachDiskRequest) (*attacherv1.CardDisk, error) {
	want, err := c.wish(r)
	if err != nil {
		return nil, err
	}
	if err := c.enter(); err != nil {
		return nil, err
	}
	defer c.calls.Done()
	ctx, cancel := context.WithTimeout(ctx, attachMost)
	defer cancel()
	defer context.AfterFunc(c.life, cancel)()
	held, err := c.holds.Use(want.Owner)
	if err != nil {
		return nil, err
	}
	defer held()
	out, err := c.attachDisk(ctx, want)
	if err != nil {
		if ctx.Err() != nil && !errors.Is(err, kind.Unavailable) {
			err = kind.Wrap(kind.Unavailable, err)
		}
		return nil, fmt.Errorf("attach disk %s: %w", want.ID, err)
	}
	return out, nil
}

// wish reads what a caller wants.
func (c *Card) wish(r *attacherv1.AttachDiskRequest) (*disk, error) {
	d := &disk{ID: r.GetId(), Purpose: r.GetPurpose(), Owner: r.GetOwner(), State: attaching}
	err := checkName("id", d.ID)
	if d.Owner != "" {
		err = errors.Join(err, checkName("owner", d.Owner))
	}
	if err != nil {
		return nil, kind.Wrap(kind.Invalid, err)
	}
	if purposes[d.Purpose] == "" {
		return nil, kind.Errorf(kind.Invalid, "attach disk %s: purpose %s", d.ID, d.Purpose)
	}
	switch s := r.GetSource().(type) {
	case *attacherv1.AttachDiskRequest_Attachment:
		if err := c.remoteOf(d, s.Attachment); err != nil {
			return nil, fmt.Errorf("attach disk %s: %w", d.ID, err)
		}
	case *attacherv1.AttachDiskRequest_Volume:
		d.Volume = s.Volume
		if d.Volume == "" || len(d.Volume) > 4096 {
			return nil, kind.Errorf(kind.Invalid, "attach disk %s: volume: must be 1 to 4096 bytes", d.ID)
		}
	default:
		return nil, kind.Errorf(kind.Invalid, "attach disk %s: it needs an attachment or a volume to show", d.ID)
	}
	d.name(c.names)
	return d, nil
}

// remoteOf reads an attachment.
func (c *Card) remoteOf(d *disk, a *attacherv1.Attachment) error {
	if a.GetTransport() == "rbd" || a.GetRbd() != nil {
		return kind.Errorf(kind.Unsupported, "an attachment of transport rbd: create an RbdVolume at the card's bridge and attach it as a volume")
	}
	if a.GetNode() != c.o.Host || a.GetHostNqn() != identity.HostNQN(c.o.Host) {
		return kind.Errorf(kind.Denied, "the attachment is node %.128s's, as %.223s: this card shows disks to node %s only", a.GetNode(), a.GetHostNqn(), c.o.Host)
	}
	transport, ok := map[string]string{"nvme-tcp": "tcp", "nvme-rdma": "rdma"}[a.GetTransport()]
	if !ok {
		return kind.Errorf(kind.Unsupported, "transport %.40q: a card connects by nvme-tcp or nvme-rdma", a.GetTransport())
	}
	id, err := uuid.Parse(a.GetUuid())
	if err != nil || a.GetNsid() == 0 || a.GetSizeBytes() <= 0 {
		return kind.Errorf(kind.Invalid, "nvmeNamespace %d with uuid %.40q and %d bytes: the attachment must be as AttachBlock answered it", a.GetNsid(), a.GetUuid(), a.GetSizeBytes())
	}
	if nqn := a.GetSubsystemNqn(); !strings.HasPrefix(nqn, "nqn.") || len(nqn) > 223 || strings.ContainsFunc(nqn, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		return kind.Errorf(kind.Invalid, "subsystem %.223q is no NQN", nqn)
	}
	d.Remote = &remote{Subsystem: a.GetSubsystemNqn(), HostNQN: a.GetHostNqn(), NSID: a.GetNsid(), UUID: id.String()}
	for _, p := range a.GetPortals() {
		if p.GetTransport() != transport {
			continue
		}
		ip, err := netip.ParseAddr(p.GetAddress())
		port, perr := strconv.ParseUint(p.GetService(), 10, 16)
		if err != nil || perr != nil || port == 0 || ip.Zone() != "" {
			return kind.Errorf(kind.Invalid, "portal %.60q %.20q: must be an IP address and a port", p.GetAddress(), p.GetService())
		}
		d.Remote.Portals = append(d.Remote.Portals, portal{RDMA: transport == "rdma", Address: ip.String(), Port: uint16(port)})
	}
	if n := len(d.Remote.Portals); n == 0 || n > maxPortals {
		return kind.Errorf(kind.Invalid, "the attachment has %d portals of transport %s: must be 1 to %d", n, transport, maxPortals)
	}
	d.SizeBytes, d.ReadOnly = a.GetSizeBytes(), !a.GetWritable()
	d.UUID = c.names.NvmeNamespace(diskKey(d.ID, d.Purpose), d.Remote.UUID)
	return nil
}

// attachDisk does it for a caller whose hold stays.
func (c *Card) attachDisk(ctx context.Context, want *disk) (*attacherv1.CardDisk, error) {
	unlock, err := c.locks.Lock(ctx, want.nqn)
	if err != nil {
		return nil, err
	}
	defer unlock()
	s := c.begin("attach")
	if want.Volume != "" {
		v, err := c.bridge.volume(ctx, want.Volume)
		if err != nil {
			return nil, err
		}
		want.UUID, want.SizeBytes, want.ReadOnly = c.names.NvmeNamespace(want.key, v.source), v.sizeBytes, v.readOnly
		s.done("volume")
	}
	have, err := c.load(want.key)
	if err != nil {
		return nil, err
	}
	if have != nil {
		if have, err = c.settle(ctx, have, want); err != nil {
			return nil, err
		}
	}
	d, err := c.record(ctx, have, want)
	if err != nil {
		return nil, err
	}
	s.done("leased")
	if err := c.show(ctx, d, s); err != nil {
		if d.State != attached { // else it is repaired
			c.giveUp(d)
		}
		return nil, err
	}
	if d.State != attached {
		told := *d
		told.State = attached
		if err := c.save(&told); err != nil {
			c.giveUp(d)
			return nil, err
		}
		d = &told
	}
	c.noteProblem(d.nqn, "")
	s.done("recorded")
	out := d.proto(c.names)
	out.Steps = s.taken
	return out, nil
}

// settle decides what becomes of a disk that is on record when want is asked for: it
// returns the record to go on with, nil when the disk was taken away first.
func (c *Card) settle(ctx context.Context, have, want *disk) (*disk, error) {
	c.mu.Lock()
	delete(c.left, have.nqn) // somebody asks for it: it is not forgotten
	c.mu.Unlock()
	going := have.State == detaching || have.Owner != "" && have.Owner != want.Owner && !c.alive(have.Owner)
	switch {
	case !going && have.Owner != want.Owner && have.Owner != "":
		return nil, kind.Errorf(kind.InUse, "it is attached for %s", have.Owner)
	case !going && have.Owner != want.Owner:
		return nil, kind.Errorf(kind.Exists, "it is attached without an owner: detach it first")
	case have.UUID == want.UUID && have.controller == want.controller:
		return have, nil
	case !going && have.State == attached:
		return nil, kind.Errorf(kind.Exists, "it shows something else: detach it first")
	}
	return nil, c.undo(ctx, have, releaseMost)
}

// record writes down what is to be shown, with a function for it. The disk that it returns
// is attached already when it was, and only compared then.
func (c *Card) record(ctx context.Context, have, want *disk) (*disk, error) {
	d := *want
	if have != nil {
		d.Function, d.CreatedUnixNanos, d.Attachment = have.Function, have.CreatedUnixNanos, have.Attachment
		if have.State == attached && have.Owner == want.Owner {
			d.State = attached
			if same(have, &d) {
				return &d, nil
			}
		}
		if have.State == detaching {
			d.Attachment = uuid.Nil
		}
	}
	if d.Attachment == uuid.Nil {
		d.Attachment, d.CreatedUnixNanos = uuid.New(), c.o.Now().UnixNano()
	}
	if have != nil { // it has its function
		c.need(&d)
		return &d, c.save(&d)
	}
	for fresh := false; ; fresh = true {
		shown, err := c.shown(ctx, fresh)
		if err != nil {
			return nil, err
		}
		err = c.db.Update(func(tx *bbolt.Tx) (err error) {
			if d.Function, err = c.take(tx, d.key, shown); err != nil {
				return err
			}
			return put(tx, disksBucket, d.key, &d)
		})
		if err == nil {
			c.need(&d)
			return &d, nil
		}
		if !errors.Is(err, kind.NoSpace) || fresh {
			return nil, err
		}
	}
}

// same tells whether a record says the same as another, of the same disk and source.
func same(a, b *disk) bool {
	if a.SizeBytes != b.SizeBytes || a.ReadOnly != b.ReadOnly || a.Volume != b.Volume || (a.Remote == nil) != (b.Remote == nil) {
		return false
	}
	return a.Remote == nil || a.Remote.NSID == b.Remote.NSID && slices.Equal(a.Remote.Portals, b.Remote.Portals)
}

// giveUp takes away what was made of a disk that could not be attached: now, if that is
// quick, and else in the background. The caller has its lock.
func (c *Card) giveUp(d *disk) {
	ctx, cancel := context.WithTimeout(c.life, undoMost)
	defer cancel()
	if err := c.undo(ctx, d, 0); err != nil && c.life.Err() == nil {
		c.o.Logger.Warn("what was made for a disk that could not be attached is still there, will try again", "disk", d.ID, "purpose", purposes[d.Purpose], "error", err)
		c.poke()
	}
}

// show makes the host see a disk. Everything that is there already is compared and left.
// The caller has the disk's lock.
func (c *Card) show(ctx context.Context, d *disk, s *steps) error {
	if d.Remote == nil {
		return c.showVolume(ctx, d, d.Volume, s)
	}
	if err := c.connect(ctx, d, false); err != nil {
		return err
	}
	s.done("connected")
	for until := time.Now().Add(findMost); ; {
		volume, err := c.find(ctx, d)
		if err != nil {
			return err
		}
		s.done("found")
		// What was found may be what the store just took away.
		if err = c.showVolume(ctx, d, volume, s); !errors.Is(err, errGone) || time.Now().After(until) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// errGone is a volume that is not there any more.
var errGone = errors.New("the volume went away")

// showVolume is show once the volume is there.
func (c *Card) showVolume(ctx context.Context, d *disk, volume string, s *steps) error {
	if err := c.subsystem(ctx, d); err != nil {
		return err
	}
	s.done("subsystem")
	if err := c.nvmeNamespace(ctx, d, volume); err != nil {
		if d.Remote == nil || ctx.Err() != nil {
			return err
		}
		// SPDK does not say whether it is for this.
		if _, gerr := call(ctx, c.bridge.remote.GetNvmeRemoteNamespace, &opiv1.GetNvmeRemoteNamespaceRequest{Name: volume}); errors.Is(gerr, kind.NotFound) {
			err = kind.Errorf(kind.Unavailable, "%w: %s", errGone, err.Error())
		}
		return err
	}
	s.done("nvmeNamespace")
	if err := c.plug(ctx, d, s); err != nil {
		return err
	}
	s.done("controller")
	return nil
}

// connect makes sure that the card is connected to the disk's store, by one portal at
// least; the others follow in the background. The disk is among those that need the
// controller, so that nobody deletes it from now on. again says that what was seen before
// does not count.
func (c *Card) connect(ctx context.Context, d *disk, again bool) error {
	c.mu.Lock()
	seen := c.paths[d.controller]
	c.mu.Unlock()
	if !again && d.Remote.reachedBy(seen) {
		return nil
	}
	unlock, err := c.locks.Lock(ctx, d.controller)
	if err != nil {
		return err
	}
	defer unlock()
	have, err := c.bridge.paths(ctx, d.controller)
	if err != nil {
		return err
	}
	if !d.Remote.reachedBy(have) {
		if err := c.firstPath(ctx, d.controller, d.Remote, d.Remote.Portals); err != nil {
			return err
		}
		if have, err = c.bridge.paths(ctx, d.controller); err != nil {
			return err
		}
		if len(d.Remote.Portals) > 1 {
			c.poke()
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.paths[d.controller] = have
	return nil
}

// reachedBy tells whether one of the paths is to one of the portals.
func (r *remote) reachedBy(paths []string) bool {
	return slices.ContainsFunc(r.Portals, func(p portal) bool { return slices.Contains(paths, p.id()) })
}

// firstPath connects to the first portal that answers: the next is tried when one failed or
// takes long. The caller has the controller's lock.
func (c *Card) firstPath(ctx context.Context, controller string, r *remote, portals []portal) error {
	if _, err := call(ctx, c.bridge.remote.CreateNvmeRemoteController, &opiv1.CreateNvmeRemoteControllerRequest{
		NvmeRemoteControllerId: controller, NvmeRemoteController: &opiv1.NvmeRemoteController{Multipath: opiv1.NvmeMultipath_NVME_MULTIPATH_MULTIPATH}}); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	answers := make(chan error)
	left := 0
	defer func() {
		cancel()
		for ; left > 0; left-- {
			<-answers
		}
	}()
	var errs []error
	for next := 0; ; {
		var soon <-chan time.Time
		if next < len(portals) {
			p := portals[next]
			next++
			left++
			go func() {
				err := c.bridge.connect(ctx, controller, r, p)
				if err != nil {
					err = fmt.Errorf("connect to %s at %s: %w", r.Subsystem, p.id(), err)
				}
				answers <- err
			}()
			soon = time.After(connectNext)
		}
		select {
		case err := <-answers:
			left--
			if err == nil {
				return nil
			}
			errs = append(errs, err)
			if left == 0 && next == len(portals) {
				return kind.Wrap(kind.Unavailable, errors.Join(errs...))
			}
		case <-soon:
		}
	}
}

// find waits for the store's nvmeNamespace and returns the volume that it is here.
func (c *Card) find(ctx context.Context, d *disk) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, findMost)
	defer cancel()
	// What SPDK calls it: asked for by this name it costs nothing to wait for.
	guess := fmt.Sprintf("%s/nvmeRemoteNamespaces/%sn%d", remoteName(d.controller), d.controller, d.Remote.NSID)
	for pause, n := time.Millisecond, 1; ; pause, n = min(pause*3/2, 25*time.Millisecond), n+1 {
		r, err := call(ctx, c.bridge.remote.GetNvmeRemoteNamespace, &opiv1.GetNvmeRemoteNamespaceRequest{Name: guess})
		switch {
		case err == nil && strings.EqualFold(r.GetUuid(), d.Remote.UUID):
			return r.GetName(), nil
		case err != nil && !errors.Is(err, kind.NotFound) && ctx.Err() == nil:
			return "", err
		case n%8 == 0:
			all, err := c.bridge.remoteVolumes(ctx, d.controller)
			if errors.Is(err, kind.NotFound) { // the target lost the connection meanwhile
				err = c.connect(ctx, d, true)
			}
			if err != nil && ctx.Err() == nil {
				return "", err
			}
			if all[d.Remote.UUID] != "" {
				return all[d.Remote.UUID], nil
			}
		}
		select {
		case <-ctx.Done():
			return "", kind.Errorf(kind.Unavailable, "the store shows no nvmeNamespace of uuid %s in %s, or the card's target has one of this uuid by another way: %w", d.Remote.UUID, d.Remote.Subsystem, context.Cause(ctx))
		case <-time.After(pause):
		}
	}
}

// subsystem makes the disk's subsystem. One of another disk that had the name is deleted.
func (c *Card) subsystem(ctx context.Context, d *disk) error {
	want := &opiv1.CreateNvmeSubsystemRequest{NvmeSubsystem: &opiv1.NvmeSubsystem{Spec: &opiv1.NvmeSubsystemSpec{
		Nqn: d.nqn, SerialNumber: c.names.Serial(d.UUID), ModelNumber: model, MaxNamespaces: 1, Hostnqn: identity.HostNQN(c.o.Host)}}}
	_, err := call(ctx, c.bridge.fe.CreateNvmeSubsystem, want)
	if !errors.Is(err, kind.Exists) {
		return err
	}
	if _, err := callWithin(ctx, plugMost, c.bridge.fe.DeleteNvmeSubsystem, &opiv1.DeleteNvmeSubsystemRequest{Name: subsystemName(d.nqn), AllowMissing: true}); err != nil {
		return err
	}
	_, err = call(ctx, c.bridge.fe.CreateNvmeSubsystem, want)
	return err
}

// model is the model number that hosts see.
const model = "Thaw"

// nvmeNamespace shows the volume in the disk's subsystem, which has nothing else.
func (c *Card) nvmeNamespace(ctx context.Context, d *disk, volume string) error {
	want := &opiv1.CreateNvmeNamespaceRequest{Parent: subsystemName(d.nqn), NvmeNamespace: &opiv1.NvmeNamespace{Spec: &opiv1.NvmeNamespaceSpec{
		HostNsid: 1, Uuid: d.UUID.String(), Nguid: strings.ReplaceAll(d.UUID.String(), "-", ""), VolumeNameRef: volume}}}
	_, err := call(ctx, c.bridge.fe.CreateNvmeNamespace, want)
	if err == nil || errors.Is(err, kind.Unavailable) || ctx.Err() != nil {
		return err
	}
	have, lerr := call(ctx, c.bridge.fe.ListNvmeNamespaces, &opiv1.ListNvmeNamespacesRequest{Parent: subsystemName(d.nqn)})
	if lerr != nil || len(have.GetNvmeNamespaces()) == 0 {
		return errors.Join(err, lerr)
	}
	for _, n := range have.GetNvmeNamespaces() {
		if _, derr := call(ctx, c.bridge.fe.DeleteNvmeNamespace, &opiv1.DeleteNvmeNamespaceRequest{Name: n.GetName(), AllowMissing: true}); derr != nil {
			return errors.Join(err, derr)
		}
	}
	_, err = call(ctx, c.bridge.fe.CreateNvmeNamespace, want)
	return err
}

// plug makes the disk's function show the subsystem. When somebody else took the function
// before it was ever plugged, the disk gets another one.
func (c *Card) plug(ctx context.Context, d *disk, s *steps) error {
	for range len(c.o.Functions) + 1 {
		_, err := callWithin(ctx, plugMost, c.bridge.fe.CreateNvmeController, &opiv1.CreateNvmeControllerRequest{Parent: subsystemName(d.nqn), NvmeController: pcie(d.Function)})
		if err == nil || !errors.Is(err, kind.InUse) {
			return err
		}
		shown, serr := c.shown(ctx, true)
		if serr != nil || shown[d.Function] == "" || shown[d.Function] == d.nqn || d.State != attaching {
			return errors.Join(err, serr)
		}
		c.o.Logger.Warn("somebody else took a PCIe function", "function", d.Function, "subsystem", shown[d.Function])
		next := *d
		if uerr := c.db.Update(func(tx *bbolt.Tx) (err error) {
			if err := tx.Bucket(functionsBucket).Delete([]byte(d.Function.String())); err != nil { // the disk never had it
				return err
			}
			if next.Function, err = c.take(tx, d.key, shown); err != nil {
				return err
			}
			return put(tx, disksBucket, d.key, &next)
		}); uerr != nil {
			return errors.Join(uerr, err)
		}
		d.Function = next.Function
		s.done("leased again")
	}
	return kind.Errorf(kind.NoSpace, "every PCIe function was taken by somebody else")
}

// DetachDisk implements attacherv1.CardServer.
func (c *Card) DetachDisk(ctx context.Context, r *attacherv1.DetachDiskRequest) (*attacherv1.DetachDiskResponse, error) {
	id := r.GetId()
	if err := checkName("id", id); err != nil {
		return nil, err
	}
	if purposes[r.GetPurpose()] == "" {
		return nil, kind.Errorf(kind.Invalid, "detach disk %s: purpose %s", id, r.GetPurpose())
	}
	if err := c.enter(); err != nil {
		return nil, err
	}
	defer c.calls.Done()
	ctx, cancel := context.WithTimeout(ctx, detachMost)
	defer cancel()
	defer context.AfterFunc(c.life, cancel)()
	if err := c.detachDisk(ctx, diskKey(id, r.GetPurpose()), r.GetAttachmentId()); err != nil {
		return nil, fmt.Errorf("detach disk %s: %w", id, err)
	}
	return &attacherv1.DetachDiskResponse{}, nil
}

func (c *Card) detachDisk(ctx context.Context, key, attachment string) error {
	unlock, err := c.locks.Lock(ctx, c.names.Subsystem(key))
	if err != nil {
		return err
	}
	defer unlock()
	d, err := c.load(key)
	if err != nil || d == nil {
		return err
	}
	if attachment != "" && attachment != d.Attachment.String() {
		return kind.Errorf(kind.InUse, "it is attached by a newer attachment, %s, not %.40s", d.Attachment, attachment)
	}
	err = c.undo(ctx, d, releaseMost)
	if err != nil {
		c.poke() // what was begun goes on
	}
	return err
}

// undo takes a disk from the host and then all that was made for it, the function last of
// all. It may be called at any point of an attach or of another undo. The caller has the
// disk's lock. wait is how long a function that is in use is waited for.
func (c *Card) undo(ctx context.Context, d *disk, wait time.Duration) error {
	s := c.begin("detach")
	if d.State != detaching {
		going := *d
		going.State = detaching
		if err := c.save(&going); err != nil {
			return err
		}
		d.State = detaching
	}
	s.done("recorded")
	if err := c.unplug(ctx, d, wait); err != nil {
		return err
	}
	c.sawUnplugged(d.Function)
	s.done("controller")
	if _, err := call(ctx, c.bridge.fe.DeleteNvmeNamespace, &opiv1.DeleteNvmeNamespaceRequest{Name: nvmeNamespaceName(d.nqn, d.UUID.String()), AllowMissing: true}); err != nil {
		return err
	}
	s.done("nvmeNamespace")
	if _, err := callWithin(ctx, plugMost, c.bridge.fe.DeleteNvmeSubsystem, &opiv1.DeleteNvmeSubsystemRequest{Name: subsystemName(d.nqn), AllowMissing: true}); err != nil {
		return err
	}
	s.done("subsystem")
	if err := c.disconnect(ctx, d); err != nil {
		return err
	}
	s.done("disconnected")
	err := c.db.Update(func(tx *bbolt.Tx) error {
		if err := c.give(tx, d.Function, d.key); err != nil {
			return err
		}
		return tx.Bucket(disksBucket).Delete([]byte(d.key))
	})
	if err != nil {
		return err
	}
	c.noteProblem(d.nqn, "")
	s.done("freed")
	return nil
}

// unplug takes the drive from the host, and tries for a while when the function is in use.
func (c *Card) unplug(ctx context.Context, d *disk, wait time.Duration) error {
	until := time.Now().Add(wait)
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, 500*time.Millisecond) {
		_, err := callWithin(ctx, plugMost, c.bridge.fe.DeleteNvmeController, &opiv1.DeleteNvmeControllerRequest{Name: controllerName(d.nqn, d.Function), AllowMissing: true})
		if err == nil || !errors.Is(err, kind.InUse) || time.Now().Add(pause).After(until) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
		}
	}
}

// disconnect ends the connection to a store that no other disk needs.
func (c *Card) disconnect(ctx context.Context, d *disk) error {
	if d.controller == "" || c.unneed(d) {
		return nil
	}
	err := c.dropRemote(ctx, d.controller)
	if err != nil {
		c.need(d) // it is still there
	}
	return err
}

// dropRemote deletes a remote controller that nobody needs.
func (c *Card) dropRemote(ctx context.Context, controller string) error {
	unlock, err := c.locks.Lock(ctx, controller)
	if err != nil {
		return err
	}
	defer unlock()
	return c.dropUnneeded(ctx, controller)
}

// dropUnneeded is dropRemote for who has the controller's lock.
func (c *Card) dropUnneeded(ctx context.Context, controller string) error {
	c.mu.Lock()
	if len(c.users[controller]) > 0 { // by now
		c.mu.Unlock()
		return nil
	}
	delete(c.paths, controller) // whoever needs it from now on waits for the lock
	c.mu.Unlock()
	_, err := call(ctx, c.bridge.remote.DeleteNvmeRemoteController, &opiv1.DeleteNvmeRemoteControllerRequest{Name: remoteName(controller), AllowMissing: true})
	return err
}

// noteProblem takes note of what is wrong with a disk, or that nothing is, and tells
// whether that is news.
func (c *Card) noteProblem(nqn, problem string) (news bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	news = c.problems[nqn] != problem
	if problem == "" {
		delete(c.problems, nqn)
	} else {
		c.problems[nqn] = problem
	}
	return news
}

// noteLack is noteProblem unless something more exact is known.
func (c *Card) noteLack(nqn, problem string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.problems[nqn] == "" {
		c.problems[nqn] = problem
	}
}
