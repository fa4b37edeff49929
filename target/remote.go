package target

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme/host"
	"github.com/thaw-project/thaw/target/bdev"
	"github.com/thaw-project/thaw/target/rpc"
)

// The NVMe/TCP host as disks: each nvmeNamespace of a connected subsystem is a bdev named
// <controller>n<nsid>.

const (
	// attachPatience bounds one attempt to attach.
	attachPatience = 10 * time.Second

	// maxRemotes bounds the controllers, each of which has goroutines and connections.
	maxRemotes = 1024

	// forever is the loss timeout for ctrlr_loss_timeout_sec -1.
	forever = 100 * 365 * 24 * time.Hour
)

// remote is an attached subsystem. Its fields are guarded by Target.admin.
type remote struct {
	t       *Target
	p       remoteParams
	portals []remoteParams // as asked for, the first included
	h       *host.Host
	changed chan struct{} // the nvmeNamespaces changed
	stop    context.CancelFunc
	wg      sync.WaitGroup
	disks   map[uint32]*disk
}

type remoteParams struct {
	Name       string `json:"name"`
	Type       string `json:"trtype"`
	Address    string `json:"traddr"`
	Family     string `json:"adrfam,omitempty"`
	Service    string `json:"trsvcid,omitempty"`
	Priority   string `json:"priority,omitempty"`
	SubNQN     string `json:"subnqn,omitempty"`
	HostNQN    string `json:"hostnqn,omitempty"`
	HostAddr   string `json:"hostaddr,omitempty"`
	HostSvc    string `json:"hostsvcid,omitempty"`
	Reftag     bool   `json:"prchk_reftag,omitempty"`
	Guard      bool   `json:"prchk_guard,omitempty"`
	HDGST      bool   `json:"hdgst,omitempty"`
	DDGST      bool   `json:"ddgst,omitempty"`
	ConnectUs  uint64 `json:"fabrics_connect_timeout_us,omitempty"`
	Multipath  string `json:"multipath,omitempty"`
	Queues     uint32 `json:"num_io_queues,omitempty"`
	Loss       *int32 `json:"ctrlr_loss_timeout_sec,omitempty"`
	Reconnect  uint32 `json:"reconnect_delay_sec,omitempty"`
	FastFail   uint32 `json:"fast_io_fail_timeout_sec,omitempty"`
	PSK        string `json:"psk,omitempty"`
	MaxBdevs   uint32 `json:"max_bdevs,omitempty"`
	DHKey      string `json:"dhchap_key,omitempty"`
	DHCtrlrKey string `json:"dhchap_ctrlr_key,omitempty"`
	AllowUnrec bool   `json:"allow_unrecognized_csi,omitempty"`

	// HostID is ours: it stays the same over restarts. On record only.
	HostID string `json:"thaw_hostid,omitempty"`
}

// hostPort checks the portal.
func (p *remoteParams) hostPort() (string, error) {
	switch typ := strings.ToUpper(p.Type); typ {
	case "TCP":
	case "PCIE", "RDMA", "FC", "VFIOUSER":
		return "", rpc.Errno(syscall.ENODEV, kind.Errorf(kind.Unsupported, "trtype %s is not supported", typ))
	default:
		return "", &rpc.Error{Code: -int(syscall.EINVAL), Message: fmt.Sprintf("Failed to parse trtype: %.32s", p.Type)}
	}
	ip, err := netip.ParseAddr(p.Address)
	if err != nil || ip.Zone() != "" {
		return "", rpc.Errno(syscall.EINVAL, kind.Errorf(kind.Invalid, "traddr %.64q is no IP address", p.Address))
	}
	if p.Family != "" && !strings.EqualFold(p.Family, familyOf(ip)) {
		return "", &rpc.Error{Code: -int(syscall.EINVAL), Message: fmt.Sprintf("Failed to parse adrfam: %.32s", p.Family)}
	}
	if _, err := strconv.ParseUint(p.Service, 10, 16); err != nil {
		return "", rpc.Errno(syscall.EINVAL, kind.Errorf(kind.Invalid, "trsvcid %.64q is no port", p.Service))
	}
	return net.JoinHostPort(ip.String(), p.Service), nil
}

// config is what package host takes.
func (p *remoteParams) config(addr string) (host.Config, error) {
	c := host.Config{Portals: []string{addr}, SubNQN: p.SubNQN, HostNQN: p.HostNQN, Queues: int(min(p.Queues, 128)), HeaderDigest: p.HDGST, DataDigest: p.DDGST, ConnectTimeout: attachPatience}
	if p.ConnectUs != 0 {
		c.ConnectTimeout = min(time.Duration(min(p.ConnectUs, 1<<40))*time.Microsecond, time.Minute)
	}
	if p.Reconnect != 0 {
		c.ReconnectDelay = time.Duration(p.Reconnect) * time.Second
		c.ReconnectMax = c.ReconnectDelay
	}
	loss := int32(0)
	if p.Loss != nil {
		loss = *p.Loss
	}
	switch {
	case loss < -1 || p.FastFail != 0 && loss == 0 || loss > 0 && int64(p.FastFail) > int64(loss) || loss != 0 && p.Reconnect == 0 || loss == 0 && p.Reconnect != 0 || loss > 0 && int64(p.Reconnect) > int64(loss):
		// The rules of SPDK's bdev_nvme_check_io_error_resiliency_params.
		return c, rpc.Errno(syscall.EINVAL, kind.Errorf(kind.Invalid, "ctrlr_loss_timeout_sec %d, reconnect_delay_sec %d, fast_io_fail_timeout_sec %d: the delay and the fail timeout must be at most the loss timeout, and with a loss timeout there is a delay", loss, p.Reconnect, p.FastFail))
	case p.FastFail != 0:
		c.LossTimeout = time.Duration(p.FastFail) * time.Second
	case loss > 0:
		c.LossTimeout = time.Duration(loss) * time.Second
	case loss == -1:
		c.LossTimeout = forever
	default:
		// SPDK tries once and then fails I/O until the next reset succeeds.
		c.LossTimeout = attachPatience
	}
	if p.PSK != "" || p.DHKey != "" || p.DHCtrlrKey != "" {
		return c, rpc.Errno(syscall.ENOKEY, kind.Errorf(kind.Unsupported, "TLS and DH-HMAC-CHAP are not supported"))
	}
	if p.HostAddr != "" || p.HostSvc != "" {
		return c, rpc.Errno(syscall.EINVAL, kind.Errorf(kind.Unsupported, "hostaddr and hostsvcid are not supported"))
	}
	var err error
	if p.HostID != "" {
		if c.HostID, err = uuid.Parse(p.HostID); err != nil {
			return c, rpc.Errno(syscall.EINVAL, kind.Errorf(kind.Invalid, "host identifier: %w", err))
		}
	}
	return c, nil
}

func (t *Target) attachController(ctx context.Context, params json.RawMessage) (any, error) {
	var p remoteParams
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	if p.HostID != "" {
		return nil, rpc.Internal("spdk_json_decode_object failed", kind.Errorf(kind.Invalid, "thaw_hostid cannot be given"))
	}
	addr, err := p.hostPort()
	if err != nil {
		return nil, err
	}
	var known *remote
	_, err = t.change(func() (any, error) {
		if known = t.remotes[p.Name]; known != nil {
			return nil, known.mayAdd(&p)
		}
		if p.Name == "" || p.SubNQN == "" {
			return nil, rpc.Errno(syscall.EINVAL, kind.Errorf(kind.Invalid, "name and subnqn must be given"))
		}
		if len(t.remotes) >= maxRemotes {
			return nil, rpc.Errno(syscall.ENOSPC, kind.Errorf(kind.NoSpace, "there are %d controllers", maxRemotes))
		}
		return nil, nil
	})
	switch {
	case err != nil:
		return nil, err
	case known != nil:
		return t.addPath(ctx, known, p, addr)
	}
	p.HostID = uuid.NewString()
	c, err := p.config(addr)
	if err != nil {
		return nil, err
	}
	return t.attachConfig(ctx, []remoteParams{p}, c)
}

// attachConfig connects to a subsystem and registers its nvmeNamespaces. It takes admin
// only once it is connected.
func (t *Target) attachConfig(ctx context.Context, portals []remoteParams, c host.Config) (any, error) {
	p := portals[0]
	r := &remote{t: t, p: p, portals: portals, changed: make(chan struct{}, 1), disks: map[uint32]*disk{}}
	c.Log = t.log
	c.Changed = func() {
		select {
		case r.changed <- struct{}{}:
		default:
		}
	}
	ctx, cancel := context.WithTimeout(ctx, attachPatience)
	defer cancel()
	var err error
	if r.h, err = host.Connect(ctx, c); err != nil {
		// SPDK answers one code for all that keeps it from connecting.
		return nil, rpc.Errno(syscall.ENODEV, err)
	}
	result, err := t.change(func() (any, error) {
		if t.remotes[p.Name] != nil {
			return nil, rpc.Errno(syscall.EALREADY, kind.Errorf(kind.Exists, "controller %s was attached meanwhile", p.Name))
		}
		if err := t.keep(classRemote, p.Name, "bdev_nvme_attach_controller", portals); err != nil {
			return nil, err
		}
		// Not the target's context: lvstores on the disks are closed first.
		run, stop := context.WithCancel(context.Background())
		r.stop = stop
		t.remotes[p.Name] = r
		r.sync()
		r.wg.Add(1)
		go r.run(run)
		return r.names(), nil
	})
	if err != nil {
		r.h.Close()
	}
	return result, err
}

// mayAdd tells whether p is another path to r: SPDK's checks and texts.
func (r *remote) mayAdd(p *remoteParams) error {
	refuse := func(errno syscall.Errno, text string, args ...any) error {
		return &rpc.Error{Code: -int(errno), Message: fmt.Sprintf(text, args...)}
	}
	addr, _ := p.hostPort()
	switch strings.ToLower(p.Multipath) {
	case "disable":
		return refuse(syscall.EALREADY, "A controller named %s already exists and multipath is disabled", p.Name)
	case "", "failover", "multipath":
	default:
		return refuse(syscall.EINVAL, "Invalid multipath parameter: %.32s", p.Multipath)
	}
	for _, o := range r.h.Portals() {
		if o.Address == addr {
			return refuse(syscall.EALREADY, "A controller named %s already exists with the specified network path", p.Name)
		}
	}
	if p.SubNQN != "" && p.SubNQN != r.p.SubNQN {
		return refuse(syscall.EINVAL, "A controller named %s already exists, but uses a different subnqn (%s)", p.Name, r.p.SubNQN)
	}
	if p.HostNQN != "" && p.HostNQN != r.h.HostNQN() {
		return refuse(syscall.EINVAL, "A controller named %s already exists, but uses a different hostnqn (%s)", p.Name, r.h.HostNQN())
	}
	return nil
}

// addPath adds a portal to an attached subsystem.
func (t *Target) addPath(ctx context.Context, r *remote, p remoteParams, addr string) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, attachPatience)
	defer cancel()
	if err := r.h.AddPortal(ctx, addr); err != nil {
		return nil, rpc.Errno(syscall.ENODEV, err)
	}
	return t.change(func() (any, error) {
		if t.remotes[p.Name] != r {
			return nil, rpc.Errno(syscall.ENODEV, kind.Errorf(kind.NotFound, "controller %s was detached meanwhile", p.Name))
		}
		list := append(slices.Clone(r.portals), p)
		if err := t.keep(classRemote, p.Name, "bdev_nvme_attach_controller", list); err != nil {
			return nil, errors.Join(err, r.h.RemovePortal(addr))
		}
		r.portals = list
		return r.names(), nil
	})
}

// run follows what the subsystem says of its nvmeNamespaces, and whether it is there at
// all, until the controller is detached.
func (r *remote) run(ctx context.Context) {
	defer r.wg.Done()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var down time.Time
	for {
		select {
		case <-ctx.Done():
			r.h.Close()
			return
		case <-r.changed:
			r.t.admin.Lock()
			if ctx.Err() == nil && !r.t.closed {
				r.sync()
			}
			r.t.admin.Unlock()
		case now := <-tick.C:
			switch {
			case r.up():
				down = time.Time{}
			case down.IsZero():
				down = now
			case r.p.Loss != nil && *r.p.Loss > 0 && now.Sub(down) > time.Duration(*r.p.Loss)*time.Second:
				r.lose(ctx)
			}
		}
	}
}

// lose deletes a controller whose loss timeout is over, as SPDK does. With a record it is
// attached again when it can be.
func (r *remote) lose(ctx context.Context) {
	r.t.admin.Lock()
	defer r.t.admin.Unlock()
	if ctx.Err() != nil || r.t.closed {
		return
	}
	r.t.log.Error("controller deleted: it was not reachable for its loss timeout", "controller", r.p.Name, "subsystem", r.p.SubNQN)
	r.drop(false)
	r.t.lost(objectKey(classRemote, r.p.Name))
}

// drop takes the disks away and ends run, without waiting. The caller holds admin.
func (r *remote) drop(wanted bool) {
	delete(r.t.remotes, r.p.Name)
	defer r.unblock()()
	for nsid, d := range r.disks {
		delete(r.disks, nsid)
		r.t.unregister(d, wanted)
	}
	r.stop()
}

// unblock makes sure that nobody waits for a subsystem that is out of reach, perhaps for
// ever, while its disks are taken away: I/O fails at once when no path is up, else after a
// while, which lvstores have to write what they hold. The function that it returns ends
// that.
func (r *remote) unblock() (done func()) {
	if !r.up() {
		r.h.Close()
		return func() {}
	}
	late := time.AfterFunc(attachPatience, func() { r.h.Close() })
	return func() { late.Stop() }
}

// up tells whether some path is.
func (r *remote) up() bool {
	return slices.ContainsFunc(r.h.Portals(), func(p host.PortalState) bool { return p.Up })
}

// sync registers what came and unregisters what went. The caller holds admin.
func (r *remote) sync() {
	present := map[uint32]uuid.UUID{}
	for _, n := range r.h.NvmeNamespaces() {
		present[n.NSID] = n.UUID
		d := r.disks[n.NSID]
		if d != nil && d.id != n.UUID { // another disk under the number
			delete(r.disks, n.NSID)
			r.t.unregister(d, false)
			d = nil
		}
		if d == nil {
			r.add(n)
		} else {
			r.t.resized(d)
		}
	}
	for nsid, d := range r.disks {
		if _, ok := present[nsid]; !ok {
			delete(r.disks, nsid)
			r.t.unregister(d, false)
		}
	}
}

func (r *remote) add(n host.NvmeNamespace) {
	name := fmt.Sprintf("%sn%d", r.p.Name, n.NSID)
	dev, err := r.h.Open(n.NSID)
	if err == nil {
		d := &disk{name: name, id: n.UUID, product: "NVMe disk", blockBytes: n.BlockBytes, driver: &remoteDisk{r: r, dev: dev}}
		if err = r.t.register(d); err == nil {
			r.disks[n.NSID] = d
			return
		}
		dev.Close()
	}
	// With SPDK too: an nvmeNamespace whose UUID some bdev has already, as when a target
	// attaches what it exports itself, becomes no bdev, and attaching it is no error.
	r.t.log.Error("nvmeNamespace is no bdev", "name", name, "uuid", n.UUID, "err", err)
}

// names lists the bdevs in order of nvmeNamespace.
func (r *remote) names() []string {
	names := []string{}
	for _, n := range r.h.NvmeNamespaces() {
		if d := r.disks[n.NSID]; d != nil {
			names = append(names, d.name)
		}
	}
	return names
}

func (t *Target) detachController(params json.RawMessage) (any, error) {
	var p struct {
		Name     string `json:"name"`
		Type     string `json:"trtype,omitempty"`
		Family   string `json:"adrfam,omitempty"`
		Address  string `json:"traddr,omitempty"`
		Service  string `json:"trsvcid,omitempty"`
		SubNQN   string `json:"subnqn,omitempty"`
		HostAddr string `json:"hostaddr,omitempty"`
		HostSvc  string `json:"hostsvcid,omitempty"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	var r *remote
	_, err := t.change(func() (any, error) {
		r = t.remotes[p.Name]
		if r == nil {
			if t.isPending(classRemote, p.Name) {
				return nil, t.forget(classRemote, p.Name)
			}
			return nil, rpc.Errno(syscall.ENODEV, kind.Errorf(kind.NotFound, "no controller %.160q", p.Name))
		}
		if p.SubNQN != "" && p.SubNQN != r.p.SubNQN {
			return nil, rpc.Errno(syscall.ENXIO, kind.Errorf(kind.NotFound, "controller %s is of subsystem %s", p.Name, r.p.SubNQN))
		}
		if p.Address != "" && len(r.portals) > 1 {
			path := remoteParams{Type: "TCP", Address: p.Address, Service: p.Service}
			gone := r
			r = nil // the others stay
			return nil, gone.removePath(&path)
		}
		if p.Address != "" && (p.Address != r.portals[0].Address || p.Service != "" && p.Service != r.portals[0].Service) {
			return nil, rpc.Errno(syscall.ENXIO, kind.Errorf(kind.NotFound, "controller %s has no path %s", p.Name, p.Address))
		}
		if err := t.forget(classRemote, p.Name); err != nil {
			return nil, err
		}
		r.drop(true)
		return nil, nil
	})
	if err != nil {
		return nil, err
	}
	if r != nil {
		r.wg.Wait() // disconnected when the answer comes
	}
	return true, nil
}

// removePath ends one of several paths. The caller holds admin.
func (r *remote) removePath(path *remoteParams) error {
	addr, err := path.hostPort()
	if err != nil {
		return err
	}
	at := slices.IndexFunc(r.portals, func(p remoteParams) bool { a, err := p.hostPort(); return err == nil && a == addr })
	if at < 0 {
		return rpc.Errno(syscall.ENXIO, kind.Errorf(kind.NotFound, "controller %s has no path %s", r.p.Name, addr))
	}
	list := slices.Delete(slices.Clone(r.portals), at, at+1)
	// What the controller is called and how it connects goes on with what is left.
	list[0].HostID, list[0].HostNQN = r.p.HostID, r.p.HostNQN
	if err := r.t.keep(classRemote, r.p.Name, "bdev_nvme_attach_controller", list); err != nil {
		return err
	}
	r.portals = list
	return errnoOf(r.h.RemovePortal(addr))
}

// reconnect attaches a recorded controller in the background. The caller holds admin.
func (t *Target) reconnect(o object) {
	if t.connecting[o.key] {
		return
	}
	t.connecting[o.key] = true
	t.wg.Add(1)
	go func() {
		defer t.wg.Done()
		err := t.reattach(o)
		t.admin.Lock()
		defer t.admin.Unlock()
		delete(t.connecting, o.key)
		if err == nil || t.closed {
			return
		}
		if now, ok := t.pending[o.key]; ok {
			now.complain(t, err)
		}
	}()
}

// reattach makes the calls that attached a controller: one for each portal. One portal
// that answers is enough; the others are tried by the host itself.
func (t *Target) reattach(o object) error {
	var list []json.RawMessage
	if err := json.Unmarshal(o.Params, &list); err != nil || len(list) == 0 {
		return kind.Errorf(kind.Corrupt, "its record is no list: %w", err)
	}
	var portals []remoteParams
	for _, raw := range list {
		var p remoteParams
		if err := rpc.Decode(raw, &p); err != nil {
			return kind.Errorf(kind.Corrupt, "its record: %w", err)
		}
		portals = append(portals, p)
	}
	return t.attachAll(portals)
}

// attachAll attaches over all portals at once.
func (t *Target) attachAll(portals []remoteParams) error {
	p := portals[0]
	addr, err := p.hostPort()
	if err != nil {
		return err
	}
	c, err := p.config(addr)
	if err != nil {
		return err
	}
	for _, o := range portals[1:] {
		more, err := o.hostPort()
		if err != nil {
			return err
		}
		c.Portals = append(c.Portals, more)
	}
	_, err = t.attachConfig(t.ctx, portals, c)
	return err
}

func (t *Target) getControllers(params json.RawMessage) (any, error) {
	var p struct {
		Name string `json:"name,omitempty"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	type trid struct {
		address
		SubNQN string `json:"subnqn"`
	}
	type hostInfo struct {
		NQN     string `json:"nqn"`
		Address string `json:"addr"`
		Service string `json:"svcid"`
	}
	type path struct {
		State  string   `json:"state"`
		TRID   trid     `json:"trid"`
		CNTLID uint16   `json:"cntlid"`
		Host   hostInfo `json:"host"`
	}
	type info struct {
		Name  string `json:"name"`
		Paths []path `json:"ctrlrs"`
	}
	if p.Name != "" && t.remotes[p.Name] == nil {
		return nil, &rpc.Error{Code: int(syscall.EINVAL), Message: fmt.Sprintf("Controller %.160s does not exist", p.Name)} // SPDK's sign
	}
	list := []info{}
	for _, name := range slices.Sorted(maps.Keys(t.remotes)) {
		if p.Name != "" && p.Name != name {
			continue
		}
		r := t.remotes[name]
		i := info{Name: name, Paths: []path{}}
		for _, s := range r.h.Portals() {
			state := "enabled"
			if !s.Up {
				state = "reconnect_is_delayed"
			}
			i.Paths = append(i.Paths, path{state, trid{addressOf(s.Address), r.p.SubNQN}, s.CNTLID, hostInfo{NQN: r.h.HostNQN()}})
		}
		list = append(list, i)
	}
	return list, nil
}

// remoteDisk is an nvmeNamespace.
type remoteDisk struct {
	r   *remote
	dev *host.Device // for what it says of itself
}

// open opens the nvmeNamespace once more: closing a device ends what waits for it.
func (d *remoteDisk) open() (bdev.Device, error) {
	own := d.dev.Info()
	dev, err := d.r.h.Open(own.NSID)
	if err != nil {
		return nil, err
	}
	if dev.Info().UUID != own.UUID {
		dev.Close()
		return nil, kind.Errorf(kind.NotFound, "nvmeNamespace %d is another disk by now", own.NSID)
	}
	return dev, nil
}

func (d *remoteDisk) sizeBytes() int64 { return d.dev.SizeBytes() }
func (d *remoteDisk) readOnly() bool   { return d.dev.ReadOnly() }
func (d *remoteDisk) close() error     { return d.dev.Close() }

func (d *remoteDisk) supports() ioSupport {
	return ioSupport{unmap: true, flush: true, writeZeroes: true}
}

// specific has the part of SPDK's bdev_nvme_dump_info_json that says what it is.
func (d *remoteDisk) specific() any {
	type trid struct {
		address
		SubNQN string `json:"subnqn"`
	}
	type ns struct {
		ID       uint32 `json:"id"`
		CanShare bool   `json:"can_share"`
	}
	type one struct {
		TRID trid `json:"trid"`
		NS   ns   `json:"ns_data"`
	}
	i := d.dev.Info()
	list := []one{}
	for _, p := range d.r.h.Portals() {
		list = append(list, one{trid{addressOf(p.Address), d.r.p.SubNQN}, ns{i.NSID, true}})
	}
	return struct {
		NVMe   []one  `json:"nvme"`
		Policy string `json:"mp_policy"`
	}{list, "active_passive"}
}

// resetController makes all paths of a controller anew. I/O waits meanwhile.
func (t *Target) resetController(ctx context.Context, params json.RawMessage) (any, error) {
	var p struct {
		Name   string `json:"name"`
		CNTLID uint16 `json:"cntlid,omitempty"`
	}
	if err := decode(params, &p); err != nil {
		return nil, err
	}
	var h *host.Host
	_, err := t.change(func() (any, error) {
		r := t.remotes[p.Name]
		if r == nil || p.CNTLID != 0 && !slices.ContainsFunc(r.h.Portals(), func(s host.PortalState) bool { return s.CNTLID == p.CNTLID }) {
			return nil, rpc.Errno(syscall.ENODEV, kind.Errorf(kind.NotFound, "no controller %.160q", p.Name))
		}
		h = r.h
		return nil, nil
	})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, attachPatience)
	defer cancel()
	if err := h.Reset(ctx); err != nil {
		return nil, rpc.Errno(syscall.EIO, err)
	}
	return true, nil
}
