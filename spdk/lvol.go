package spdk

import (
	"context"
)

// LvolStore is an lvstore.
type LvolStore struct {
	UUID              string `json:"uuid"`
	Name              string `json:"name"`
	BaseBdev          string `json:"base_bdev"`
	TotalDataClusters uint64 `json:"total_data_clusters"`
	FreeClusters      uint64 `json:"free_clusters"`
	BlockSizeBytes    uint64 `json:"block_size"`
	ClusterSizeBytes  uint64 `json:"cluster_size"`
}

// LvolStoreCreateParams describe an lvstore.
type LvolStoreCreateParams struct {
	BdevName         string `json:"bdev_name"`
	Name             string `json:"lvs_name"`
	ClusterSizeBytes uint32 `json:"cluster_sz,omitempty"`
	ClearMethod      string `json:"clear_method,omitempty"` // none, unmap or write_zeroes
}

// BdevLvolCreateLvstore makes an lvstore on a bdev and returns its UUID.
func (c *Client) BdevLvolCreateLvstore(ctx context.Context, p LvolStoreCreateParams) (string, error) {
	return get[string](ctx, c, "bdev_lvol_create_lvstore", p)
}

// BdevLvolDeleteLvstore destroys the lvstore of a name with all that is in it.
func (c *Client) BdevLvolDeleteLvstore(ctx context.Context, name string) error {
	return c.do(ctx, "bdev_lvol_delete_lvstore", struct {
		Name string `json:"lvs_name"`
	}{name})
}

type renaming struct {
	OldName string `json:"old_name"`
	NewName string `json:"new_name"`
}

// BdevLvolRenameLvstore renames an lvstore.
func (c *Client) BdevLvolRenameLvstore(ctx context.Context, oldName, newName string) error {
	return c.do(ctx, "bdev_lvol_rename_lvstore", renaming{oldName, newName})
}

type lvstoreName struct {
	Name string `json:"lvs_name,omitempty"`
}

// BdevLvolGetLvstores returns the lvstore of a name, or all when it is empty.
// kind.NotFound when there is none of the name.
func (c *Client) BdevLvolGetLvstores(ctx context.Context, name string) ([]LvolStore, error) {
	var p any // an object without a name is refused
	if name != "" {
		p = lvstoreName{name}
	}
	return get[[]LvolStore](ctx, c, "bdev_lvol_get_lvstores", p)
}

// LvolCreateParams describe an lvol. Its lvstore is given by name or by UUID.
type LvolCreateParams struct {
	Name          string `json:"lvol_name"`
	SizeMiB       uint64 `json:"size_in_mib"` // rounded up to clusters
	ThinProvision bool   `json:"thin_provision,omitempty"`
	StoreName     string `json:"lvs_name,omitempty"`
	StoreUUID     string `json:"uuid,omitempty"`
}

// BdevLvolCreate makes an lvol and returns its UUID: kind.Exists when the name is taken.
func (c *Client) BdevLvolCreate(ctx context.Context, p LvolCreateParams) (string, error) {
	return get[string](ctx, c, "bdev_lvol_create", p)
}

// BdevLvolSnapshot makes a snapshot, in the same lvstore, of an lvol ("lvs/name" or its
// UUID), which becomes its clone, and returns the snapshot's UUID.
func (c *Client) BdevLvolSnapshot(ctx context.Context, lvol, snapshot string) (string, error) {
	return get[string](ctx, c, "bdev_lvol_snapshot", struct {
		Lvol     string `json:"lvol_name"`
		Snapshot string `json:"snapshot_name"`
	}{lvol, snapshot})
}

// BdevLvolClone makes a clone, in the same lvstore, of a snapshot ("lvs/name" or its
// UUID) and returns its UUID: kind.NotFound when there is no such snapshot.
func (c *Client) BdevLvolClone(ctx context.Context, snapshot, clone string) (string, error) {
	return get[string](ctx, c, "bdev_lvol_clone", struct {
		Snapshot string `json:"snapshot_name"`
		Clone    string `json:"clone_name"`
	}{snapshot, clone})
}

// BdevLvolCloneBdev makes an lvol that is a clone of any bdev, which is found again by its
// UUID, and returns the lvol's UUID. It may succeed with an lvol that is degraded and has
// no bdev: see BdevLvolGetLvols.
func (c *Client) BdevLvolCloneBdev(ctx context.Context, bdev, storeName, clone string) (string, error) {
	return get[string](ctx, c, "bdev_lvol_clone_bdev", struct {
		Bdev  string `json:"bdev"`
		Store string `json:"lvs_name"`
		Clone string `json:"clone_name"`
	}{bdev, storeName, clone})
}

// BdevLvolSetReadOnly makes an lvol read-only for good.
func (c *Client) BdevLvolSetReadOnly(ctx context.Context, name string) error {
	return c.do(ctx, "bdev_lvol_set_read_only", named{name})
}

// BdevLvolInflate copies all that an lvol has of its parents, which it then no longer
// needs, and allocates the rest.
func (c *Client) BdevLvolInflate(ctx context.Context, name string) error {
	return c.do(ctx, "bdev_lvol_inflate", named{name})
}

// BdevLvolDecoupleParent copies what an lvol has of its parent, and leaves holes.
func (c *Client) BdevLvolDecoupleParent(ctx context.Context, name string) error {
	return c.do(ctx, "bdev_lvol_decouple_parent", named{name})
}

type parenting struct {
	Lvol   string `json:"lvol_name"`
	Parent string `json:"parent_name"`
}

// BdevLvolSetParent makes an lvol the clone of another snapshot.
func (c *Client) BdevLvolSetParent(ctx context.Context, lvol, snapshot string) error {
	return c.do(ctx, "bdev_lvol_set_parent", parenting{lvol, snapshot})
}

// BdevLvolSetParentBdev makes an lvol the clone of a bdev outside the lvstore.
func (c *Client) BdevLvolSetParentBdev(ctx context.Context, lvol, bdev string) error {
	return c.do(ctx, "bdev_lvol_set_parent_bdev", parenting{lvol, bdev})
}

// BdevLvolResize sets an lvol's size, rounded up to clusters.
func (c *Client) BdevLvolResize(ctx context.Context, name string, sizeMiB uint64) error {
	return c.do(ctx, "bdev_lvol_resize", struct {
		Name    string `json:"name"`
		SizeMiB uint64 `json:"size_in_mib"`
	}{name, sizeMiB})
}

// BdevLvolRename gives an lvol another name in its lvstore.
func (c *Client) BdevLvolRename(ctx context.Context, oldName, newName string) error {
	return c.do(ctx, "bdev_lvol_rename", renaming{oldName, newName})
}

// BdevLvolDelete removes an lvol. Of a snapshot it succeeds when there is at most one
// clone.
func (c *Client) BdevLvolDelete(ctx context.Context, name string) error {
	return c.do(ctx, "bdev_lvol_delete", named{name})
}

// Lvol is an lvol as its lvstore knows it, also when it is degraded and has no bdev.
type Lvol struct {
	Alias                string `json:"alias"` // "lvs/name"
	UUID                 string `json:"uuid"`
	Name                 string `json:"name"`
	IsThinProvisioned    bool   `json:"is_thin_provisioned"`
	IsSnapshot           bool   `json:"is_snapshot"`
	IsClone              bool   `json:"is_clone"`
	IsEsnapClone         bool   `json:"is_esnap_clone"`
	IsDegraded           bool   `json:"is_degraded"`
	NumAllocatedClusters uint64 `json:"num_allocated_clusters"`
	Store                struct {
		Name string `json:"name"`
		UUID string `json:"uuid"`
	} `json:"lvs"`
}

// BdevLvolGetLvols returns the lvols of the lvstore of a name, or of all when it is empty.
func (c *Client) BdevLvolGetLvols(ctx context.Context, storeName string) ([]Lvol, error) {
	return get[[]Lvol](ctx, c, "bdev_lvol_get_lvols", lvstoreName{storeName})
}

// BdevLvolStartShallowCopy begins to copy the clusters that an lvol, which must be
// read-only, has itself to a bdev of at least its size, and returns the number of the
// operation for BdevLvolCheckShallowCopy.
func (c *Client) BdevLvolStartShallowCopy(ctx context.Context, lvol, bdev string) (uint32, error) {
	r, err := get[struct {
		ID uint32 `json:"operation_id"`
	}](ctx, c, "bdev_lvol_start_shallow_copy", struct {
		Source string `json:"src_lvol_name"`
		Target string `json:"dst_bdev_name"`
	}{lvol, bdev})
	return r.ID, err
}

// ShallowCopy is how far a copy is.
type ShallowCopy struct {
	State          string `json:"state"` // "in progress", "complete" or "error"
	CopiedClusters uint64 `json:"copied_clusters"`
	TotalClusters  uint64 `json:"total_clusters"`
	Error          string `json:"error"`
}

// BdevLvolCheckShallowCopy returns how far a copy is. After it answered one that ended,
// the target knows it no more.
func (c *Client) BdevLvolCheckShallowCopy(ctx context.Context, operation uint32) (ShallowCopy, error) {
	return get[ShallowCopy](ctx, c, "bdev_lvol_check_shallow_copy", struct {
		ID uint32 `json:"operation_id"`
	}{operation})
}

// RBDClusterParams describe a connection to a Ceph cluster that bdevs share.
type RBDClusterParams struct {
	Name        string            `json:"name"`
	UserID      string            `json:"user_id,omitempty"`
	ConfigParam map[string]string `json:"config_param,omitempty"`
	ConfigFile  string            `json:"config_file,omitempty"`
	KeyFile     string            `json:"key_file,omitempty"`
}

// BdevRBDRegisterCluster connects to a Ceph cluster and returns its name.
func (c *Client) BdevRBDRegisterCluster(ctx context.Context, p RBDClusterParams) (string, error) {
	return get[string](ctx, c, "bdev_rbd_register_cluster", p)
}

// RBDCreateParams describe a bdev of a Ceph image.
type RBDCreateParams struct {
	Name           string `json:"name,omitempty"`
	PoolName       string `json:"pool_name"`
	RBDName        string `json:"rbd_name"`
	BlockSizeBytes uint32 `json:"block_size"`
	ClusterName    string `json:"cluster_name,omitempty"`
	UUID           string `json:"uuid,omitempty"`
}

// BdevRBDCreate makes a bdev of a Ceph image and returns its name.
func (c *Client) BdevRBDCreate(ctx context.Context, p RBDCreateParams) (string, error) {
	return get[string](ctx, c, "bdev_rbd_create", p)
}

// BdevRBDDelete removes a bdev, not its image.
func (c *Client) BdevRBDDelete(ctx context.Context, name string) error {
	return c.do(ctx, "bdev_rbd_delete", named{name})
}
