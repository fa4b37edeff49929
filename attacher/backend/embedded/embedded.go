// Package embedded is the backend that keeps its lvols in this process: package lvol
// with what an attacher needs besides. It must not know who exports or presents them.
package embedded

import (
	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/lvol"
	"github.com/thaw-project/thaw/target/bdev"
)

// Backend is an lvol.Store as an attacher.Backend.
type Backend struct{ *lvol.Store }

var _ attacher.Backend = Backend{}

// OpenLvol implements attacher.Backend.
func (b Backend) OpenLvol(name string, readOnly bool) (bdev.Device, error) {
	d, err := b.Store.OpenLvol(name, readOnly)
	if err != nil {
		return nil, err
	}
	return d, nil
}
