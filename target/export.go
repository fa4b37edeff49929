package target

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme"
	"github.com/thaw-project/thaw/target/nvmf"
	"github.com/thaw-project/thaw/target/rpc"
)

// The nvmf_* methods. package nvmf keeps the state; here is what it does not know: which
// disk is behind an nvmeNamespace, and SPDK's words for things.

// export names an nvmeNamespace.
type export struct {
	nqn  string
	nsid uint32
}

// Defaults where SPDK has them and package nvmf has others.
const (
	defaultModel         = "Thaw bdev Controller"
	defaultMaxNamespaces = 32
	defaultQueues        = 127
	defaultDepth         = 128
	defaultMaxIO         = 128 << 10
	defaultInCapsule     = 8192
	maxMaxIO             = 1 << 20
)

// transport is what nvmf_create_transport was called with, and what it became.
type transport struct {
	Type          string  `json:"trtype"`
	QueueDepth    uint32  `json:"max_queue_depth,omitempty"`
	Queues        uint32  `json:"max_io_qpairs_per_ctrlr,omitempty"`
	InCapsule     *uint32 `json:"in_capsule_data_size,omitempty"`
	MaxIO         uint32  `json:"max_io_size,omitempty"`
	IOUnit        uint32  `json:"io_unit_size,omitempty"`
	AdminDepth    uint32  `json:"max_aq_depth,omitempty"`
	SharedBuffers uint32  `json:"num_shared_buffers,omitempty"`
	BufferCache   uint32  `json:"buf_cache_size,omitempty"`
	DIF           bool    `json:"dif_insert_or_strip,omitempty"`
	AbortTimeout  uint32  `json:"abort_timeout_sec,omitempty"`
	Zcopy         bool    `json:"zcopy,omitempty"`
	PollRate      uint32  `json:"acceptor_poll_rate,omitempty"`
	AckTimeout    uint32  `json:"ack_timeout,omitempty"`
	DataWRPool    uint32  `json:"data_wr_pool_size,omitempty"`
	NoPassthru    bool    `json:"disable_command_passthru,omitempty"`
	C2HSuccess    *bool   `json:"c2h_success,omitempty"`
	ControlMsgs   uint32  `json:"control_msg_num,omitempty"`
	SockPriority  uint32  `json:"sock_priority,omitempty"`
	MaxSRQDepth   uint32  `json:"max_srq_depth,omitempty"`
	NoSRQ         bool    `json:"no_srq,omitempty"`
	AcceptBacklog uint32  `json:"acceptor_backlog,omitempty"`
	NoWRBatching  bool    `json:"no_wr_batching,omitempty"`
	KAS           uint32  `json:"kas,omitempty"`
	MinKATO       uint32  `json:"min_kato,omitempty"`
	NoBAR0        bool    `json:"disable_mappable_bar0,omitempty"`
	NoAdaptiveIRQ bool    `json:"disable_adaptive_irq,omitempty"`
	NoShadow      bool    `json:"disable_shadow_doorbells,omitempty"`
	CQESize       uint32  `json:"num_cqe,omitempty"`
	Target        string  `json:"tgt_name,omitempty"`
}

func (t *Target) nvmfOptions() nvmf.Options {
	return nvmf.Options{MaxQueues: defaultQueues, Engine: t.o.Engine, Log: t.log}
}

func (t *Target) createTransport(params json.RawMessage) (any, error) {
	var p transport
	if err := decodeNvmf(params, &p); err != nil {
		return nil, err
	}
	typ := strings.ToUpper(p.Type)
	switch typ {
	case "TCP":
	case "RDMA":
		return nil, rpc.Internal("Transport type 'RDMA' create failed", kind.Errorf(kind.Unsupported, "no RDMA device is used by this target"))
	default:
		return nil, &rpc.Error{Code: rpc.CodeInvalidParams, Message: fmt.Sprintf("Invalid transport type '%.32s'", p.Type)}
	}
	if t.transport != nil {
		return nil, rpc.Internal(fmt.Sprintf("Transport type '%.32s' already exists", p.Type), nil)
	}
	p.Type = typ
	set := func(v *uint32, d uint32) {
		if *v == 0 {
			*v = d
		}
	}
	given := p
	set(&p.QueueDepth, defaultDepth)
	set(&p.Queues, defaultQueues)
	set(&p.MaxIO, defaultMaxIO)
	set(&p.IOUnit, p.MaxIO)
	set(&p.AdminDepth, nvmf.AdminDepth)
	in := uint32(defaultInCapsule)
	if p.InCapsule != nil {
		in = *p.InCapsule
	}
	p.InCapsule = &in
	o := t.nvmfOptions()
	// A larger limit than ours is what a client may hope for, not what it needs: hosts
	// are told ours.
	o.MaxTransfer, o.QueueDepth, o.MaxQueues = int(min(p.MaxIO, maxMaxIO)), int(min(p.QueueDepth, 1024)), int(min(p.Queues, 1024))
	if o.InCapsule = int(min(in, uint32(o.MaxTransfer))); o.InCapsule == 0 {
		o.InCapsule = -1
	}
	fresh, err := nvmf.New(o)
	if err == nil {
		err = t.moveSubsystems(fresh)
	}
	if err != nil {
		return nil, rpc.Internal("Transport type 'TCP' create failed", err)
	}
	if err := t.keep(classTransport, typ, "nvmf_create_transport", given); err != nil {
		return nil, err
	}
	p.MaxIO, p.QueueDepth, p.Queues = uint32(o.MaxTransfer), uint32(o.QueueDepth), uint32(o.MaxQueues)
	t.mu.Lock()
	t.transport = &p
	t.mu.Unlock()
	return true, nil
}

// moveSubsystems replaces the nvmf target by one with other options. There was no
// transport, so nobody is connected and nothing listens.
func (t *Target) moveSubsystems(fresh *nvmf.Target) error {
	for _, s := range t.nvmf.Subsystems() {
		err := fresh.CreateSubsystem(s.SubsystemConfig)
		for _, h := range s.Hosts {
			err = errors.Join(err, fresh.AddHost(s.NQN, h))
		}
		for _, n := range s.NvmeNamespaces {
			_, nerr := fresh.AddNvmeNamespace(s.NQN, n)
			err = errors.Join(err, nerr)
		}
		if err != nil {
			fresh.Close()
			return err
		}
	}
	old := t.nvmf
	t.mu.Lock()
	t.nvmf = fresh
	t.mu.Unlock()
	return old.Close()
}

func (t *Target) getTransports(params json.RawMessage) (any, error) {
	var p struct {
		Type   string `json:"trtype,omitempty"`
		Target string `json:"tgt_name,omitempty"`
	}
	if err := decodeNvmf(params, &p); err != nil {
		return nil, err
	}
	type info struct {
		Type          string `json:"trtype"`
		QueueDepth    uint32 `json:"max_queue_depth"`
		Queues        uint32 `json:"max_io_qpairs_per_ctrlr"`
		InCapsule     uint32 `json:"in_capsule_data_size"`
		MaxIO         uint32 `json:"max_io_size"`
		IOUnit        uint32 `json:"io_unit_size"`
		AdminDepth    uint32 `json:"max_aq_depth"`
		SharedBuffers uint32 `json:"num_shared_buffers"`
		BufferCache   uint32 `json:"buf_cache_size"`
		DIF           bool   `json:"dif_insert_or_strip"`
		Zcopy         bool   `json:"zcopy"`
		C2HSuccess    bool   `json:"c2h_success"`
		SockPriority  uint32 `json:"sock_priority"`
		AbortTimeout  uint32 `json:"abort_timeout_sec"`
		AckTimeout    uint32 `json:"ack_timeout"`
		DataWRPool    uint32 `json:"data_wr_pool_size"`
	}
	t.mu.RLock()
	tr := t.transport
	t.mu.RUnlock()
	list := []info{}
	if tr != nil && (p.Type == "" || strings.EqualFold(p.Type, tr.Type)) {
		list = append(list, info{tr.Type, tr.QueueDepth, tr.Queues, *tr.InCapsule, tr.MaxIO, tr.IOUnit, tr.AdminDepth, tr.SharedBuffers, tr.BufferCache,
			false, false, tr.C2HSuccess == nil || *tr.C2HSuccess, tr.SockPriority, tr.AbortTimeout, tr.AckTimeout, tr.DataWRPool})
	}
	if p.Type != "" && len(list) == 0 {
		return nil, rpc.Errno(enodev, kind.Errorf(kind.NotFound, "no transport %.32q", p.Type))
	}
	return list, nil
}

type subsystemParams struct {
	NQN           string `json:"nqn"`
	Serial        string `json:"serial_number,omitempty"`
	Model         string `json:"model_number,omitempty"`
	Target        string `json:"tgt_name,omitempty"`
	MaxNamespaces uint32 `json:"max_namespaces,omitempty"`
	AllowAnyHost  bool   `json:"allow_any_host,omitempty"`
	ANA           bool   `json:"ana_reporting,omitempty"`
	MinCNTLID     uint16 `json:"min_cntlid,omitempty"`
	MaxCNTLID     uint16 `json:"max_cntlid,omitempty"`
	MaxDiscard    uint64 `json:"max_discard_size_kib,omitempty"`
	MaxZeroes     uint64 `json:"max_write_zeroes_size_kib,omitempty"`
	Passthrough   bool   `json:"passthrough,omitempty"`
	NSSR          bool   `json:"enable_nssr,omitempty"`
}

func (t *Target) createSubsystem(params json.RawMessage) (any, error) {
	var p subsystemParams
	if err := decodeNvmf(params, &p); err != nil {
		return nil, err
	}
	if len(p.Serial) > 20 || len(p.Model) > 40 {
		return nil, rpc.InvalidParams(kind.Errorf(kind.Invalid, "a serial number has at most 20 characters, a model number 40"))
	}
	if p.Passthrough {
		return nil, rpc.InvalidParams(kind.Errorf(kind.Unsupported, "passthrough subsystems are not supported"))
	}
	lo, hi := max(p.MinCNTLID, 1), p.MaxCNTLID
	if hi == 0 {
		hi = maxCNTLID
	}
	failed := fmt.Sprintf("Unable to create subsystem %.223s", p.NQN)
	c := nvmf.SubsystemConfig{NQN: p.NQN, Serial: p.Serial, Model: p.Model, MaxNvmeNamespaces: p.MaxNamespaces, AllowAnyHost: p.AllowAnyHost, MinCNTLID: lo, MaxCNTLID: hi}
	if c.Model == "" {
		c.Model = defaultModel
	}
	if c.MaxNvmeNamespaces == 0 {
		c.MaxNvmeNamespaces = defaultMaxNamespaces
	}
	if lo > hi || hi > maxCNTLID {
		return nil, &rpc.Error{Code: rpc.CodeInvalidParams, Message: fmt.Sprintf("Invalid cntlid range [%d-%d]", lo, hi)}
	}
	if err := t.nvmf.CreateSubsystem(c); err != nil {
		return nil, rpc.Internal(failed, err)
	}
	if err := t.keep(classSubsystem, p.NQN, "nvmf_create_subsystem", p); err != nil {
		t.nvmf.DeleteSubsystem(p.NQN) // it has nothing yet
		return nil, err
	}
	return true, nil
}

const maxCNTLID = 0xffef

func (t *Target) deleteSubsystem(params json.RawMessage) (any, error) {
	var p struct {
		NQN    string `json:"nqn"`
		Target string `json:"tgt_name,omitempty"`
	}
	if err := decodeNvmf(params, &p); err != nil {
		return nil, err
	}
	if t.subsystem(p.NQN) == nil && !t.isPending(classSubsystem, p.NQN) {
		return nil, rpc.InvalidParams(noSubsystem(p.NQN))
	}
	keys := []string{objectKey(classSubsystem, p.NQN), objectKey(classHost, p.NQN), objectKey(classNamespace, p.NQN), objectKey(classListener, p.NQN)}
	if err := t.forgetKeys(append(keys, t.partnersOf(p.NQN)...)...); err != nil {
		return nil, err
	}
	if err := t.nvmf.DeleteSubsystem(p.NQN); err != nil && kind.Of(err) != kind.NotFound {
		return nil, rpc.Internal("", err)
	}
	t.mu.RLock()
	var leases []*lease
	for e, l := range t.exports {
		if e.nqn == p.NQN {
			leases = append(leases, l)
		}
	}
	t.mu.RUnlock()
	for _, l := range leases {
		t.endPartners(l, true)
		t.dropExport(l)
	}
	return true, nil
}

// dropExport releases the disk of an nvmeNamespace that is gone.
func (t *Target) dropExport(l *lease) {
	t.mu.Lock()
	for e, o := range t.exports {
		if o == l {
			delete(t.exports, e)
		}
	}
	t.mu.Unlock()
	l.release()
}

func noSubsystem(nqn string) error {
	return kind.Errorf(kind.NotFound, "no subsystem %.223q", nqn)
}

// subsystem describes one subsystem, nil when there is none.
func (t *Target) subsystem(nqn string) *nvmf.SubsystemInfo {
	t.mu.RLock()
	tg := t.nvmf
	t.mu.RUnlock()
	s, err := tg.Subsystem(nqn)
	if err != nil {
		return nil
	}
	return &s
}

// listeners are the addresses of a subsystem or of discovery; none when there is no such
// subsystem.
func (t *Target) listeners(nqn string) []string {
	if nqn == nvme.DiscoveryNQN {
		return t.nvmf.DiscoveryListeners()
	}
	if s := t.subsystem(nqn); s != nil {
		return s.Listeners
	}
	return nil
}

// address is SPDK's transport identifier.
type address struct {
	Type    string `json:"trtype"`
	Family  string `json:"adrfam,omitempty"`
	Address string `json:"traddr"`
	Service string `json:"trsvcid,omitempty"`
}

// hostPort checks an address and returns it as package net has it.
func (a *address) hostPort() (string, error) {
	ip, err := netip.ParseAddr(a.Address)
	if err != nil || ip.Zone() != "" {
		return "", kind.Errorf(kind.Invalid, "traddr %.64q is no IP address", a.Address)
	}
	if _, err := strconv.ParseUint(a.Service, 10, 16); err != nil {
		return "", kind.Errorf(kind.Invalid, "trsvcid %.64q is no port", a.Service)
	}
	if !strings.EqualFold(a.Type, "TCP") {
		return "", kind.Errorf(kind.Unsupported, "trtype %.32q is not TCP", a.Type)
	}
	if f := familyOf(ip); a.Family != "" && !strings.EqualFold(a.Family, f) {
		return "", kind.Errorf(kind.Invalid, "adrfam %.32q of %s is not %s", a.Family, ip, f)
	}
	return net.JoinHostPort(ip.String(), a.Service), nil
}

func familyOf(ip netip.Addr) string {
	if ip.Is4() {
		return "IPv4"
	}
	return "IPv6"
}

// addressOf is the address that package net has as hostPort.
func addressOf(hostPort string) address {
	ap, err := netip.ParseAddrPort(hostPort)
	if err != nil {
		return address{Type: "TCP", Address: hostPort}
	}
	return address{"TCP", familyOf(ap.Addr()), ap.Addr().String(), strconv.Itoa(int(ap.Port()))}
}

type namespaceInfo struct {
	NSID     uint32 `json:"nsid"`
	BdevName string `json:"bdev_name"`
	Name     string `json:"name"`
	NGUID    string `json:"nguid,omitempty"`
	EUI64    string `json:"eui64,omitempty"`
	UUID     string `json:"uuid,omitempty"`
}

type subsystemInfo struct {
	NQN          string    `json:"nqn"`
	Subtype      string    `json:"subtype"`
	Listeners    []address `json:"listen_addresses"`
	AllowAnyHost bool      `json:"allow_any_host"`
	Hosts        []nqnInfo `json:"hosts"`
	*nvmSubsystem
}

// nvmSubsystem is what only an NVM subsystem has.
type nvmSubsystem struct {
	Serial        string          `json:"serial_number"`
	Model         string          `json:"model_number"`
	MaxNamespaces uint32          `json:"max_namespaces"`
	MinCNTLID     uint16          `json:"min_cntlid"`
	MaxCNTLID     uint16          `json:"max_cntlid"`
	Namespaces    []namespaceInfo `json:"namespaces"`
}

type nqnInfo struct {
	NQN string `json:"nqn"`
}

func (t *Target) getSubsystems(params json.RawMessage) (any, error) {
	var p struct {
		NQN    string `json:"nqn,omitempty"`
		Target string `json:"tgt_name,omitempty"`
	}
	if err := decodeNvmf(params, &p); err != nil {
		return nil, err
	}
	t.mu.RLock()
	tg := t.nvmf
	t.mu.RUnlock()
	list := []subsystemInfo{}
	if p.NQN == "" || p.NQN == nvme.DiscoveryNQN {
		d := subsystemInfo{NQN: nvme.DiscoveryNQN, Subtype: "Discovery", Listeners: []address{}, AllowAnyHost: true, Hosts: []nqnInfo{}}
		for _, a := range tg.DiscoveryListeners() {
			d.Listeners = append(d.Listeners, addressOf(a))
		}
		list = append(list, d)
	}
	if p.NQN != "" { // of many, which need not be looked at
		if s, err := tg.Subsystem(p.NQN); err == nil {
			list = append(list, describeSubsystem(s))
		}
	} else {
		for _, s := range tg.Subsystems() {
			list = append(list, describeSubsystem(s))
		}
	}
	if p.NQN != "" && len(list) == 0 {
		return nil, rpc.Errno(enodev, noSubsystem(p.NQN))
	}
	return list, nil
}

func describeSubsystem(s nvmf.SubsystemInfo) subsystemInfo {
	i := subsystemInfo{NQN: s.NQN, Subtype: "NVMe", Listeners: []address{}, AllowAnyHost: s.AllowAnyHost, Hosts: []nqnInfo{}, nvmSubsystem: &nvmSubsystem{
		Serial: s.Serial, Model: s.Model, MaxNamespaces: s.MaxNvmeNamespaces, MinCNTLID: s.MinCNTLID, MaxCNTLID: s.MaxCNTLID, Namespaces: []namespaceInfo{}}}
	for _, a := range s.Listeners {
		i.Listeners = append(i.Listeners, addressOf(a))
	}
	for _, h := range s.Hosts {
		i.Hosts = append(i.Hosts, nqnInfo{h})
	}
	for _, n := range s.NvmeNamespaces {
		ns := namespaceInfo{NSID: n.NSID, BdevName: n.Name, Name: n.Name, UUID: n.UUID.String(), NGUID: strings.ToUpper(hex.EncodeToString(n.NGUID[:]))}
		if n.EUI64 != [8]byte{} {
			ns.EUI64 = strings.ToUpper(hex.EncodeToString(n.EUI64[:]))
		}
		i.Namespaces = append(i.Namespaces, ns)
	}
	return i
}

type namespaceParams struct {
	NSID          uint32 `json:"nsid,omitempty"`
	BdevName      string `json:"bdev_name"`
	PTPLFile      string `json:"ptpl_file,omitempty"`
	NGUID         string `json:"nguid,omitempty"`
	EUI64         string `json:"eui64,omitempty"`
	UUID          string `json:"uuid,omitempty"`
	ANAGroup      uint32 `json:"anagrpid,omitempty"`
	NoAutoVisible bool   `json:"no_auto_visible,omitempty"`
	HideMetadata  bool   `json:"hide_metadata,omitempty"`
}

// config turns parameters into what package nvmf takes.
func (p *namespaceParams) config(d *disk) (nvmf.NvmeNamespaceConfig, error) {
	c := nvmf.NvmeNamespaceConfig{NSID: p.NSID, Name: d.name, UUID: d.id, BlockBytes: d.blockBytes, Inline: d.inline, Adaptive: d.local}
	if p.UUID != "" {
		id, err := uuid.Parse(p.UUID)
		if err != nil || len(p.UUID) != 36 {
			return c, kind.Errorf(kind.Invalid, "uuid %.64q", p.UUID)
		}
		c.UUID = id
	}
	for _, h := range []struct {
		name, text string
		into       []byte
	}{{"nguid", p.NGUID, c.NGUID[:]}, {"eui64", p.EUI64, c.EUI64[:]}} {
		if h.text == "" {
			continue
		}
		raw, err := hex.DecodeString(h.text)
		if err != nil || len(raw) != len(h.into) {
			return c, kind.Errorf(kind.Invalid, "%s %.64q is not %d hex digits", h.name, h.text, 2*len(h.into))
		}
		copy(h.into, raw)
	}
	if p.NoAutoVisible || p.PTPLFile != "" {
		return c, kind.Errorf(kind.Unsupported, "no_auto_visible and ptpl_file are not supported")
	}
	return c, nil
}

type addNamespaceParams struct {
	NQN       string          `json:"nqn"`
	Namespace namespaceParams `json:"namespace"`
	Target    string          `json:"tgt_name,omitempty"`
}

// addNvmeNamespace answers every failure with -32602, as SPDK does.
func (t *Target) addNvmeNamespace(params json.RawMessage) (any, error) {
	var p addNamespaceParams
	if err := rpc.Decode(params, &p); err != nil {
		return nil, rpc.InvalidParams(err)
	}
	s := t.subsystem(p.NQN)
	if s == nil {
		return nil, rpc.InvalidParams(noSubsystem(p.NQN))
	}
	d := t.lookup(p.Namespace.BdevName)
	if d == nil {
		return nil, rpc.InvalidParams(kind.Errorf(kind.NotFound, "no bdev %.160q", p.Namespace.BdevName))
	}
	c, err := p.Namespace.config(d)
	if err != nil {
		return nil, rpc.InvalidParams(err)
	}
	l := &lease{what: "subsystem " + p.NQN, claim: exclusiveWrite, write: !d.driver.readOnly()}
	if err := t.acquire(d, l); err != nil {
		return nil, rpc.InvalidParams(err)
	}
	c.Device = l.dev
	nsid, err := t.nvmf.AddNvmeNamespace(p.NQN, c)
	if err != nil {
		l.release()
		return nil, rpc.InvalidParams(err)
	}
	e := export{p.NQN, nsid}
	key := objectKey(classNamespace, p.NQN, fmt.Sprintf("%08x", nsid))
	l.evict = func(wanted bool) { t.exportGone(e, key, l, wanted) }
	t.mu.Lock()
	t.exports[e] = l
	t.mu.Unlock()
	p.Namespace.NSID, p.Namespace.UUID, p.Namespace.BdevName = nsid, c.UUID.String(), d.name
	if err := t.keepAs(key, "nvmf_subsystem_add_ns", p); err != nil {
		t.nvmf.RemoveNvmeNamespace(p.NQN, nsid)
		t.dropExport(l)
		return nil, rpc.InvalidParams(err)
	}
	return nsid, nil
}

// exportGone removes an nvmeNamespace whose disk goes.
func (t *Target) exportGone(e export, key string, l *lease, wanted bool) {
	if err := t.nvmf.RemoveNvmeNamespace(e.nqn, e.nsid); err != nil {
		t.log.Warn("remove nvmeNamespace", "subsystem", e.nqn, "nsid", e.nsid, "err", err)
	}
	t.endPartners(l, wanted)
	t.dropExport(l)
	if !wanted {
		t.lost(key)
		return
	}
	if err := t.forgetKeys(key); err != nil {
		t.log.Error("nvmeNamespace stays on record", "subsystem", e.nqn, "nsid", e.nsid, "err", err)
	}
}

func (t *Target) removeNvmeNamespace(params json.RawMessage) (any, error) {
	var p struct {
		NQN    string `json:"nqn"`
		NSID   uint32 `json:"nsid"`
		Target string `json:"tgt_name,omitempty"`
	}
	if err := decodeNvmf(params, &p); err != nil {
		return nil, err
	}
	name := fmt.Sprintf("%08x", p.NSID)
	t.mu.RLock()
	l := t.exports[export{p.NQN, p.NSID}]
	t.mu.RUnlock()
	if l == nil && !t.isPending(classNamespace, p.NQN, name) {
		return nil, rpc.InvalidParams(kind.Errorf(kind.NotFound, "no nvmeNamespace %d of %.223q", p.NSID, p.NQN))
	}
	keys := []string{objectKey(classNamespace, p.NQN, name)}
	for path, x := range t.sockets {
		if l != nil && x.lease != nil && x.lease.with == l {
			keys = append(keys, objectKey(classSocket, path))
		}
	}
	if err := t.forgetKeys(keys...); err != nil {
		return nil, err
	}
	if l != nil {
		if err := t.nvmf.RemoveNvmeNamespace(p.NQN, p.NSID); err != nil {
			return nil, rpc.InvalidParams(err)
		}
		t.endPartners(l, true)
		t.dropExport(l)
	}
	return true, nil
}

// resized tells the hosts of a disk that its size changed.
func (t *Target) resized(d *disk) {
	t.mu.RLock()
	var list []export
	for e, l := range t.exports {
		if l.disk == d {
			list = append(list, e)
		}
	}
	t.mu.RUnlock()
	for _, e := range list {
		if err := t.nvmf.ResizeNvmeNamespace(e.nqn, e.nsid); err != nil {
			t.log.Warn("resize nvmeNamespace", "subsystem", e.nqn, "nsid", e.nsid, "err", err)
		}
	}
}

type listenerParams struct {
	NQN           string  `json:"nqn"`
	Address       address `json:"listen_address"`
	Target        string  `json:"tgt_name,omitempty"`
	SecureChannel bool    `json:"secure_channel,omitempty"`
	ANAState      string  `json:"ana_state,omitempty"`
	SockImpl      string  `json:"sock_impl,omitempty"`
}

func (t *Target) addListener(params json.RawMessage) (any, error) {
	var p listenerParams
	if err := decodeNvmf(params, &p); err != nil {
		return nil, err
	}
	hostPort, err := p.Address.hostPort()
	switch {
	case err != nil:
	case t.transport == nil:
		err = kind.Errorf(kind.Invalid, "no TCP transport: call nvmf_create_transport first")
	case p.SecureChannel:
		err = kind.Errorf(kind.Unsupported, "secure_channel (TLS) is not supported")
	case p.ANAState != "" && p.ANAState != "optimized":
		err = kind.Errorf(kind.Unsupported, "ana_state %.32q is not supported", p.ANAState)
	}
	if err != nil {
		return nil, rpc.InvalidParams(err)
	}
	got, err := t.nvmf.AddListener(p.NQN, nvmf.ListenerConfig{Address: hostPort})
	if err != nil {
		return nil, rpc.InvalidParams(err)
	}
	p.Address = addressOf(got) // with the port that was taken
	if err := t.keepAs(objectKey(classListener, p.NQN, got), "nvmf_subsystem_add_listener", p); err != nil {
		t.nvmf.RemoveListener(p.NQN, got) // it was just added
		return nil, err
	}
	return true, nil
}

func (t *Target) removeListener(params json.RawMessage) (any, error) {
	var p listenerParams
	if err := decodeNvmf(params, &p); err != nil {
		return nil, err
	}
	hostPort, err := p.Address.hostPort()
	if err != nil {
		return nil, rpc.InvalidParams(err)
	}
	if !slices.Contains(t.listeners(p.NQN), hostPort) && !t.isPending(classListener, p.NQN, hostPort) {
		return nil, rpc.InvalidParams(kind.Errorf(kind.NotFound, "%.223q does not listen at %s", p.NQN, hostPort))
	}
	if err := t.forget(classListener, p.NQN, hostPort); err != nil {
		return nil, err
	}
	if err := t.nvmf.RemoveListener(p.NQN, hostPort); err != nil && kind.Of(err) != kind.NotFound {
		return nil, rpc.InvalidParams(err)
	}
	return true, nil
}

type hostParams struct {
	NQN      string `json:"nqn"`
	Host     string `json:"host"`
	Target   string `json:"tgt_name,omitempty"`
	PSK      string `json:"psk,omitempty"`
	Key      string `json:"dhchap_key,omitempty"`
	CtrlrKey string `json:"dhchap_ctrlr_key,omitempty"`
}

func (t *Target) addHost(params json.RawMessage) (any, error) {
	var p hostParams
	if err := decodeNvmf(params, &p); err != nil {
		return nil, err
	}
	if p.PSK != "" || p.Key != "" || p.CtrlrKey != "" {
		// To let the host in without the key would be worse than not at all.
		return nil, rpc.Internal("", kind.Errorf(kind.Unsupported, "host %.223q: TLS and DH-HMAC-CHAP are not supported", p.Host))
	}
	if t.subsystem(p.NQN) == nil {
		return nil, rpc.InvalidParams(noSubsystem(p.NQN))
	}
	if err := t.nvmf.AddHost(p.NQN, p.Host); err != nil {
		return nil, rpc.Internal("", err)
	}
	if err := t.keepAs(objectKey(classHost, p.NQN, p.Host), "nvmf_subsystem_add_host", p); err != nil {
		t.nvmf.RemoveHost(p.NQN, p.Host) // it was just added
		return nil, err
	}
	return true, nil
}

func (t *Target) removeHost(params json.RawMessage) (any, error) {
	var p struct {
		NQN    string `json:"nqn"`
		Host   string `json:"host"`
		Target string `json:"tgt_name,omitempty"`
	}
	if err := decodeNvmf(params, &p); err != nil {
		return nil, err
	}
	s := t.subsystem(p.NQN)
	if s == nil {
		return nil, rpc.InvalidParams(noSubsystem(p.NQN))
	}
	if !slices.Contains(s.Hosts, p.Host) {
		return nil, rpc.Internal("", kind.Errorf(kind.NotFound, "host %.223q is not allowed at %s", p.Host, p.NQN))
	}
	if err := t.forget(classHost, p.NQN, p.Host); err != nil {
		return nil, err
	}
	if err := t.nvmf.RemoveHost(p.NQN, p.Host); err != nil {
		return nil, rpc.Internal("", err)
	}
	return true, nil
}

func (t *Target) allowAnyHost(params json.RawMessage) (any, error) {
	var p struct {
		NQN    string `json:"nqn"`
		Allow  bool   `json:"allow_any_host"`
		Target string `json:"tgt_name,omitempty"`
	}
	if err := decodeNvmf(params, &p); err != nil {
		return nil, err
	}
	s := t.subsystem(p.NQN)
	if s == nil {
		return nil, rpc.InvalidParams(noSubsystem(p.NQN))
	}
	// On record first: after a kill no more may be let in than was last asked for, and a
	// client that got no answer asks again.
	err := t.keep(classSubsystem, p.NQN, "nvmf_create_subsystem", subsystemParams{NQN: s.NQN, Serial: s.Serial, Model: s.Model, MaxNamespaces: s.MaxNvmeNamespaces,
		AllowAnyHost: p.Allow, MinCNTLID: s.MinCNTLID, MaxCNTLID: s.MaxCNTLID})
	if err != nil {
		return nil, err
	}
	if err := t.nvmf.AllowAnyHost(p.NQN, p.Allow); err != nil {
		return nil, rpc.Internal("", err)
	}
	return true, nil
}

func (t *Target) getSubsystemControllers(params json.RawMessage) (any, error) {
	s, err := t.namedSubsystem(params)
	if err != nil {
		return nil, err
	}
	type info struct {
		CNTLID  uint16 `json:"cntlid"`
		HostNQN string `json:"hostnqn"`
		HostID  string `json:"hostid"`
		Queues  int    `json:"num_io_qpairs"`
	}
	list := []info{}
	for _, c := range s.Controllers {
		list = append(list, info{c.CNTLID, c.HostNQN, c.HostID.String(), c.Queues})
	}
	return list, nil
}

func (t *Target) namedSubsystem(params json.RawMessage) (*nvmf.SubsystemInfo, error) {
	var p struct {
		NQN    string `json:"nqn"`
		Target string `json:"tgt_name,omitempty"`
	}
	if err := decodeNvmf(params, &p); err != nil {
		return nil, err
	}
	s := t.subsystem(p.NQN)
	if s == nil {
		return nil, rpc.InvalidParams(noSubsystem(p.NQN))
	}
	return s, nil
}

func (t *Target) getListeners(params json.RawMessage) (any, error) {
	s, err := t.namedSubsystem(params)
	if err != nil {
		return nil, err
	}
	type info struct {
		Address address `json:"address"`
	}
	list := []info{}
	for _, a := range s.Listeners {
		list = append(list, info{addressOf(a)})
	}
	return list, nil
}

// closeExports ends all connections and lets go of all devices.
func (t *Target) closeExports() {
	if t.nvmf == nil {
		return
	}
	if err := t.nvmf.Close(); err != nil {
		t.log.Warn("close NVMe/TCP target", "err", err)
	}
	t.mu.RLock()
	var leases []*lease
	for _, l := range t.exports {
		leases = append(leases, l)
	}
	t.mu.RUnlock()
	for _, l := range leases {
		t.dropExport(l)
	}
}
