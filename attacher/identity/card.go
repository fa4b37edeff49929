package identity

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"

	"github.com/google/uuid"
)

// Card derives the names under which a DPU shows disks to the host that it is plugged into,
// and the names of what it is connected to for them. A disk is any text that tells it from
// the host's others. All names of one card are known by their beginning, and no other host's
// begin so.
type Card struct {
	Host string // as CheckNode wants it
}

// subsystems is what the NQNs of a card's subsystems begin with. No store's UUID is "card".
func (c Card) subsystems() string { return prefix + "card:" + c.Host + ":" }

// Subsystem is the NQN of the subsystem that shows a disk, which has one of its own.
func (c Card) Subsystem(disk string) string { return c.subsystems() + digest(16, disk) }

// OwnsSubsystem tells whether Subsystem makes such NQNs for this card.
func (c Card) OwnsSubsystem(nqn string) bool {
	sum, ok := strings.CutPrefix(nqn, c.subsystems())
	return ok && isDigest(sum, 16)
}

// NvmeNamespace is the UUID, and as the same 16 bytes the NGUID, of the nvmeNamespace that
// shows a disk. It follows from what the disk shows (source: an nvmeNamespace's UUID, a
// volume's name) too: another content is another disk to a host that still knows the one
// before. It is not the source's: a host that has the same source twice, as two disks or
// also over the network, must not find one identity at two places.
func (c Card) NvmeNamespace(disk, source string) uuid.UUID {
	return uuid.NewSHA1(space, []byte("card\x00"+c.Host+"\x00"+disk+"\x00"+source))
}

// Serial is the serial number of the controller that shows the nvmeNamespace of a UUID, 20
// hex digits: what a host knows the disk by where nvmeNamespaces have no identity.
func (c Card) Serial(id uuid.UUID) string { return digest(10, "serial\x00"+id.String()) }

// remotes is what the names of a card's remote controllers begin with.
func (c Card) remotes() string { return "thaw." + digest(5, "card\x00"+c.Host) + "." }

// Remote is the name of the remote controller by which a card is connected to a store's
// subsystem as some host, 36 bytes.
func (c Card) Remote(subsystem, hostNQN string) string {
	return c.remotes() + digest(10, subsystem+"\x00"+hostNQN)
}

// OwnsRemote tells whether Remote makes such names for this card.
func (c Card) OwnsRemote(name string) bool {
	sum, ok := strings.CutPrefix(name, c.remotes())
	return ok && isDigest(sum, 10)
}

// digest is the first bytes of a text's SHA-256 in hexadecimal.
func digest(bytes int, text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:bytes])
}

func isDigest(s string, bytes int) bool {
	return len(s) == 2*bytes && strings.Trim(s, "0123456789abcdef") == ""
}
