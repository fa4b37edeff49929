package lvol

import (
	"crypto/rand"
	"fmt"
)

// uuid is a random UUID, version 4 of RFC 9562.
type uuid [16]byte

func newUUID() uuid {
	var u uuid
	rand.Read(u[:]) // never fails
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	return u
}

func (u uuid) String() string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}
