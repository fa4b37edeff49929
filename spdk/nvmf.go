package spdk

import "context"

// TransportParams describe a transport; 0 leaves SPDK's default.
type TransportParams struct {
	Type               string `json:"trtype"`
	MaxQueueDepth      uint32 `json:"max_queue_depth,omitempty"`
	MaxIOQueues        uint32 `json:"max_io_qpairs_per_ctrlr,omitempty"`
	InCapsuleDataBytes uint32 `json:"in_capsule_data_size,omitempty"`
	MaxIOBytes         uint32 `json:"max_io_size,omitempty"`
	IOUnitBytes        uint32 `json:"io_unit_size,omitempty"`
}

// NvmfCreateTransport makes a transport, which must be there before its first listener.
func (c *Client) NvmfCreateTransport(ctx context.Context, p TransportParams) error {
	return c.do(ctx, "nvmf_create_transport", p)
}

// NvmfGetTransports returns the transports that there are.
func (c *Client) NvmfGetTransports(ctx context.Context) ([]TransportParams, error) {
	return get[[]TransportParams](ctx, c, "nvmf_get_transports", nil)
}

// SubsystemParams describe a subsystem.
type SubsystemParams struct {
	NQN           string `json:"nqn"`
	SerialNumber  string `json:"serial_number,omitempty"` // at most 20 bytes
	ModelNumber   string `json:"model_number,omitempty"`  // at most 40 bytes
	MaxNamespaces uint32 `json:"max_namespaces,omitempty"`
	AllowAnyHost  bool   `json:"allow_any_host,omitempty"`
	MinCNTLID     uint16 `json:"min_cntlid,omitempty"`
	MaxCNTLID     uint16 `json:"max_cntlid,omitempty"`
}

// NvmfCreateSubsystem makes a subsystem. That it exists already is told by
// NvmfGetSubsystems only.
func (c *Client) NvmfCreateSubsystem(ctx context.Context, p SubsystemParams) error {
	return c.do(ctx, "nvmf_create_subsystem", p)
}

type subsystem struct {
	NQN string `json:"nqn"`
}

// NvmfDeleteSubsystem removes a subsystem with all that it shows.
func (c *Client) NvmfDeleteSubsystem(ctx context.Context, nqn string) error {
	return c.do(ctx, "nvmf_delete_subsystem", subsystem{nqn})
}

// SubtypeNVMe is the Subtype of subsystems with nvmeNamespaces.
const SubtypeNVMe = "NVMe"

// Subsystem is a subsystem with all that it shows.
type Subsystem struct {
	NQN          string        `json:"nqn"`
	Subtype      string        `json:"subtype"`
	Listeners    []TransportID `json:"listen_addresses"`
	AllowAnyHost bool          `json:"allow_any_host"`
	Hosts        []struct {
		NQN string `json:"nqn"`
	} `json:"hosts"`
	SerialNumber  string          `json:"serial_number"`
	ModelNumber   string          `json:"model_number"`
	MaxNamespaces uint32          `json:"max_namespaces"`
	MinCNTLID     uint16          `json:"min_cntlid"`
	MaxCNTLID     uint16          `json:"max_cntlid"`
	Namespaces    []NvmeNamespace `json:"namespaces"`
}

// NvmeNamespace is an nvmeNamespace of a subsystem.
type NvmeNamespace struct {
	NSID     uint32 `json:"nsid,omitempty"` // 0: the target chooses
	BdevName string `json:"bdev_name"`
	NGUID    string `json:"nguid,omitempty"` // 32 hexadecimal digits
	EUI64    string `json:"eui64,omitempty"` // 16 hexadecimal digits
	UUID     string `json:"uuid,omitempty"`  // empty: that of the bdev
}

// NvmfGetSubsystems returns the subsystem of an NQN, or all when it is empty, the
// discovery subsystem among them.
func (c *Client) NvmfGetSubsystems(ctx context.Context, nqn string) ([]Subsystem, error) {
	return get[[]Subsystem](ctx, c, "nvmf_get_subsystems", struct {
		NQN string `json:"nqn,omitempty"`
	}{nqn})
}

// NvmfSubsystemAddNs adds an nvmeNamespace and returns its NSID. All failures have one
// code.
func (c *Client) NvmfSubsystemAddNs(ctx context.Context, nqn string, n NvmeNamespace) (uint32, error) {
	return get[uint32](ctx, c, "nvmf_subsystem_add_ns", struct {
		NQN       string        `json:"nqn"`
		Namespace NvmeNamespace `json:"namespace"`
	}{nqn, n})
}

// NvmfSubsystemRemoveNs removes an nvmeNamespace.
func (c *Client) NvmfSubsystemRemoveNs(ctx context.Context, nqn string, nsid uint32) error {
	return c.do(ctx, "nvmf_subsystem_remove_ns", struct {
		NQN  string `json:"nqn"`
		NSID uint32 `json:"nsid"`
	}{nqn, nsid})
}

type listening struct {
	NQN     string      `json:"nqn"`
	Address TransportID `json:"listen_address"`
}

// NvmfSubsystemAddListener lets hosts connect at an address, whose SubNQN stays empty.
func (c *Client) NvmfSubsystemAddListener(ctx context.Context, nqn string, at TransportID) error {
	return c.do(ctx, "nvmf_subsystem_add_listener", listening{nqn, at})
}

// NvmfSubsystemRemoveListener ends that, with the connections that came by it.
func (c *Client) NvmfSubsystemRemoveListener(ctx context.Context, nqn string, at TransportID) error {
	return c.do(ctx, "nvmf_subsystem_remove_listener", listening{nqn, at})
}

type admitting struct {
	NQN  string `json:"nqn"`
	Host string `json:"host"`
	PSK  string `json:"psk,omitempty"`
}

// NvmfSubsystemAddHost lets a host in, by its NQN; psk names a key of the target's
// keyring, or is empty.
func (c *Client) NvmfSubsystemAddHost(ctx context.Context, nqn, host, psk string) error {
	return c.do(ctx, "nvmf_subsystem_add_host", admitting{nqn, host, psk})
}

// NvmfSubsystemRemoveHost shuts a host out and ends its connections.
func (c *Client) NvmfSubsystemRemoveHost(ctx context.Context, nqn, host string) error {
	return c.do(ctx, "nvmf_subsystem_remove_host", admitting{NQN: nqn, Host: host})
}

// NvmfSubsystemAllowAnyHost sets whether hosts that are not on the list may connect.
func (c *Client) NvmfSubsystemAllowAnyHost(ctx context.Context, nqn string, allow bool) error {
	return c.do(ctx, "nvmf_subsystem_allow_any_host", struct {
		NQN   string `json:"nqn"`
		Allow bool   `json:"allow_any_host"`
	}{nqn, allow})
}

// SubsystemController is a host's connection to a subsystem.
type SubsystemController struct {
	CNTLID      uint16 `json:"cntlid"`
	HostNQN     string `json:"hostnqn"`
	HostID      string `json:"hostid"`
	NumIOQueues int    `json:"num_io_qpairs"`
}

// NvmfSubsystemGetControllers returns who is connected to a subsystem.
func (c *Client) NvmfSubsystemGetControllers(ctx context.Context, nqn string) ([]SubsystemController, error) {
	return get[[]SubsystemController](ctx, c, "nvmf_subsystem_get_controllers", subsystem{nqn})
}
