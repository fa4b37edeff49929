package erofs

import (
	"encoding/binary"

	"github.com/thaw-project/thaw/image/layer"
	"github.com/thaw-project/thaw/kind"
)

// An extraction on a real file system goes through the kernel, which keeps POSIX
// ACLs and mode bits in agreement. This is what the kernel would do; see
// fs/posix_acl.c.
//
// The value of system.posix_acl_*: version u32 (2), then entries of tag u16,
// permissions u16, id u32.
const (
	aclAccess  = "system.posix_acl_access"
	aclDefault = "system.posix_acl_default"

	aclVersion   = 2
	aclEntrySize = 8

	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20
)

// checkACL checks that the kernel would take value, as posix_acl_valid does:
// owner, users, group, groups, mask, others, in this order.
func checkACL(value string) error {
	b := []byte(value)
	bad := kind.Errorf(kind.Invalid, "a POSIX ACL of %d bytes is not valid", len(b))
	if len(b) < 4 || (len(b)-4)%aclEntrySize != 0 || binary.LittleEndian.Uint32(b) != aclVersion {
		return bad
	}
	seen, last, named := 0, 0, false
	for b = b[4:]; len(b) > 0; b = b[aclEntrySize:] {
		tag, perm := int(binary.LittleEndian.Uint16(b)), binary.LittleEndian.Uint16(b[2:])
		repeats := tag == aclUser || tag == aclGroup
		switch tag {
		case aclUserObj, aclUser, aclGroupObj, aclGroup, aclMask, aclOther:
		default:
			return bad
		}
		if perm > 7 || tag < last || tag == last && !repeats {
			return bad
		}
		named = named || repeats
		seen, last = seen|tag, tag
	}
	const base = aclUserObj | aclGroupObj | aclOther
	if seen&base != base || named && seen&aclMask == 0 {
		return bad
	}
	return nil
}

// minimalACL tells an ACL that says no more than mode bits do.
func minimalACL(value string) bool { return len(value) == 4+3*aclEntrySize }

// chmodACL returns value after a chmod to mode.
func chmodACL(value string, mode uint16) string {
	b := []byte(value)
	group := -1
	for i := 4; i < len(b); i += aclEntrySize {
		perm := b[i+2:]
		switch binary.LittleEndian.Uint16(b[i:]) {
		case aclUserObj:
			binary.LittleEndian.PutUint16(perm, mode>>6&7)
		case aclGroupObj, aclMask:
			group = i + 2 // the mask, which comes later, wins
		case aclOther:
			binary.LittleEndian.PutUint16(perm, mode&7)
		}
	}
	if group >= 0 {
		binary.LittleEndian.PutUint16(b[group:], mode>>3&7)
	}
	return string(b)
}

// inheritACL gives a new node what the default ACL of its directory gives.
func (n *inode) inheritACL(dir *inode) {
	value, ok := dir.xattr(aclDefault)
	if !ok || n.isSymlink() {
		return
	}
	if !minimalACL(value) {
		n.setXattr(layer.Xattr{Name: aclAccess, Value: value})
	}
	if n.isDir() {
		n.setXattr(layer.Xattr{Name: aclDefault, Value: value})
	}
}

// settleACL brings the access ACL in agreement with the mode, the last step of
// setting attributes.
func (n *inode) settleACL() {
	value, ok := n.xattr(aclAccess)
	switch {
	case !ok:
	case minimalACL(value):
		n.removeXattr(aclAccess)
	default:
		n.setXattr(layer.Xattr{Name: aclAccess, Value: chmodACL(value, n.mode)})
	}
}
