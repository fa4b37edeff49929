package spdk

import "context"

// What follows only `thaw target` has; SPDK answers kind.Unsupported.

// NBDExport is a bdev that is served by NBD on a Unix socket of its own, mode 0600.
type NBDExport struct {
	BdevName    string `json:"bdev_name"`
	Socket      string `json:"socket"`                  // absolute path
	NQN         string `json:"nqn,omitempty"`           // the subsystem in whose claim it has part, and with whose nvmeNamespace it goes
	FailingSize int64  `json:"failing_bytes,omitempty"` // without a bdev: the size of a disk on which all fails
	ReadOnly    bool   `json:"read_only"`
	Connections int    `json:"connections"`
}

// ThawNBDExport serves a bdev on a socket. To repeat it succeeds; kind.Exists when the
// socket serves another.
func (c *Client) ThawNBDExport(ctx context.Context, bdev, socket, nqn string) error {
	return c.do(ctx, "thaw_nbd_export", struct {
		BdevName string `json:"bdev_name"`
		Socket   string `json:"socket"`
		NQN      string `json:"nqn,omitempty"`
	}{bdev, socket, nqn})
}

// ThawNBDExportFailing serves a disk of a size on which all fails, in place of one that is
// gone: who waits for the socket to be served again waits no more.
func (c *Client) ThawNBDExportFailing(ctx context.Context, socket string, sizeBytes int64) error {
	return c.do(ctx, "thaw_nbd_export", struct {
		Socket string `json:"socket"`
		Size   int64  `json:"failing_bytes"`
	}{socket, sizeBytes})
}

// ThawNBDUnexport ends that; clients lose their connection. kind.NotFound when the socket
// serves nothing.
func (c *Client) ThawNBDUnexport(ctx context.Context, socket string) error {
	return c.do(ctx, "thaw_nbd_unexport", struct {
		Socket string `json:"socket"`
	}{socket})
}

// ThawNBDGetExports lists what is served, by socket.
func (c *Client) ThawNBDGetExports(ctx context.Context) ([]NBDExport, error) {
	return get[[]NBDExport](ctx, c, "thaw_nbd_get_exports", nil)
}
