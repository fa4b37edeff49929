package kernel

import (
	"time"

	"github.com/mdlayher/netlink"

	"github.com/thaw-project/thaw/kind"
)

// Names and numbers of include/uapi/linux/nbd-netlink.h.
const (
	familyName  = "nbd"
	familyGroup = "nbd_mc_group"
	version     = 1

	// NBD_CMD_*.
	cmdConnect     = 1
	cmdDisconnect  = 2
	cmdReconfigure = 3
	cmdLinkDead    = 4
	cmdStatus      = 5

	attrIndex           = 1
	attrSizeBytes       = 2
	attrBlockSizeBytes  = 3
	attrTimeout         = 4 // seconds
	attrServerFlags     = 5
	attrClientFlags     = 6
	attrSockets         = 7
	attrDeadConnTimeout = 8 // seconds
	attrDeviceList      = 9
	attrBackend         = 10

	sockItem = 1
	sockFD   = 1

	deviceItem      = 1
	deviceIndex     = 1
	deviceConnected = 2
)

// Flags of the client, NBD_CFLAG_* of include/uapi/linux/nbd.h.
const (
	// DestroyOnDisconnect removes /dev/nbdN with its connection.
	DestroyOnDisconnect = 1 << 0
	// DisconnectOnClose disconnects when the last user closes the device.
	DisconnectOnClose = 1 << 1
)

// MaxBackendBytes bounds Config.Backend: sysfs shows at most a page, and nobody needs more.
const MaxBackendBytes = 512

// maxSockets bounds the connections of one device.
const maxSockets = 64

// maxStatusDevices bounds what a status reply is believed to hold: minors are 20 bits,
// and a device has at least one.
const maxStatusDevices = 1 << 20

// Config describes a device to Connect and Reconfigure.
type Config struct {
	// SizeBytes and BlockBytes (512 to the page size) are for Connect only.
	SizeBytes  int64
	BlockBytes int64
	// Timeout is for how long a request may be without its answer, in whole seconds.
	// Then its connection counts as dead, and what was under way on it is sent again
	// on another one. It is also how long after a server's death that happens.
	Timeout time.Duration
	// DeadConnTimeout is for how long requests wait for a new connection when all
	// are dead, in whole seconds; then they fail.
	DeadConnTimeout time.Duration
	// ServerFlags are the transmission flags of the export (nbd.Flag*).
	ServerFlags uint16
	// ClientFlags are of this package.
	ClientFlags uint64
	// Sockets are descriptors of connections on which transmission begins, TCP or
	// Unix streams. The kernel takes references; the caller closes its own.
	Sockets []int
	// Backend, if set, names what is behind the device, in /sys/block/nbdN/backend
	// (Linux 5.14). Reconfigure must give the same.
	Backend string
}

func (c *Config) validate(connect bool) error {
	switch {
	case len(c.Sockets) == 0 || len(c.Sockets) > maxSockets:
		return kind.Errorf(kind.Invalid, "%d sockets: must be 1 to %d", len(c.Sockets), maxSockets)
	case len(c.Backend) > MaxBackendBytes:
		return kind.Errorf(kind.Invalid, "a backend identifier of %d bytes: must be at most %d", len(c.Backend), MaxBackendBytes)
	case connect && (c.BlockBytes < 512 || c.BlockBytes&(c.BlockBytes-1) != 0 || c.SizeBytes <= 0 || c.SizeBytes%c.BlockBytes != 0):
		return kind.Errorf(kind.Invalid, "size %d in blocks of %d bytes: must be whole blocks of a power of two from 512", c.SizeBytes, c.BlockBytes)
	case c.Timeout < 0 || c.DeadConnTimeout < 0:
		return kind.Errorf(kind.Invalid, "negative timeouts")
	}
	return nil
}

// seconds rounds up: the kernel takes 0 for none.
func seconds(d time.Duration) uint64 { return uint64((d + time.Second - 1) / time.Second) }

// encode makes the attributes of CONNECT, or of RECONFIGURE of index.
func (c *Config) encode(index *uint32) ([]byte, error) {
	connect := index == nil
	if err := c.validate(connect); err != nil {
		return nil, err
	}
	e := netlink.NewAttributeEncoder()
	if connect {
		e.Uint64(attrSizeBytes, uint64(c.SizeBytes))
		e.Uint64(attrBlockSizeBytes, uint64(c.BlockBytes))
		e.Uint64(attrServerFlags, uint64(c.ServerFlags))
	} else {
		e.Uint32(attrIndex, *index)
	}
	e.Uint64(attrTimeout, seconds(c.Timeout))
	e.Uint64(attrDeadConnTimeout, seconds(c.DeadConnTimeout))
	e.Uint64(attrClientFlags, c.ClientFlags)
	if c.Backend != "" {
		e.String(attrBackend, c.Backend)
	}
	e.Nested(attrSockets, func(list *netlink.AttributeEncoder) error {
		for _, fd := range c.Sockets {
			list.Nested(sockItem, func(item *netlink.AttributeEncoder) error {
				item.Uint32(sockFD, uint32(fd))
				return nil
			})
		}
		return nil
	})
	return e.Encode()
}

func encodeIndex(index uint32) ([]byte, error) {
	e := netlink.NewAttributeEncoder()
	e.Uint32(attrIndex, index)
	return e.Encode()
}

// decodeIndex finds the index in a reply to CONNECT or in a LINK_DEAD.
func decodeIndex(data []byte) (index uint32, err error) {
	d, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return 0, err
	}
	found := false
	for d.Next() {
		if d.Type() == attrIndex {
			index, found = d.Uint32(), true
		}
	}
	if err := d.Err(); err != nil {
		return 0, err
	}
	if !found {
		return 0, kind.Errorf(kind.Unsupported, "the kernel's message names no device")
	}
	return index, nil
}

// Status is what the kernel tells of one device.
type Status struct {
	Index     uint32
	Connected bool
}

func decodeStatus(data []byte) (list []Status, err error) {
	d, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return nil, err
	}
	for d.Next() {
		if d.Type() != attrDeviceList {
			continue
		}
		d.Nested(func(devices *netlink.AttributeDecoder) error {
			for devices.Next() {
				if devices.Type() != deviceItem {
					continue
				}
				if len(list) == maxStatusDevices {
					return kind.Errorf(kind.Unsupported, "the kernel lists more than %d devices", maxStatusDevices)
				}
				var s Status
				devices.Nested(func(item *netlink.AttributeDecoder) error {
					for item.Next() {
						switch item.Type() {
						case deviceIndex:
							s.Index = item.Uint32()
						case deviceConnected:
							s.Connected = item.Uint8() != 0
						}
					}
					return nil
				})
				list = append(list, s)
			}
			return nil
		})
	}
	return list, d.Err()
}
