package kernel

import (
	"fmt"

	"github.com/mdlayher/netlink"

	"github.com/thaw-project/thaw/kind"
)

// ConnectIndex is Connect for the device of that index, which the kernel makes if there
// is none. kind.InUse when it is connected.
func ConnectIndex(index uint32, c Config) error {
	data, err := c.encode(nil)
	if err != nil {
		return fmt.Errorf("connect nbd%d: %w", index, err)
	}
	e := netlink.NewAttributeEncoder()
	e.Uint32(attrIndex, index)
	which, err := e.Encode()
	if err != nil {
		return fmt.Errorf("connect nbd%d: %w", index, err)
	}
	replies, err := call(cmdConnect, append(which, data...), true)
	if err != nil {
		return fmt.Errorf("connect nbd%d: %w", index, err)
	}
	for _, m := range replies {
		if m.Header.Command == cmdConnect {
			if got, err := decodeIndex(m.Data); err == nil && got == index {
				return nil
			}
		}
	}
	return kind.Errorf(kind.Unsupported, "connect nbd%d: the kernel did not say that it did", index)
}
