package torture

import (
	"archive/tar"
	"fmt"
	"math/rand"
	"strings"
	"time"
)

// Random returns a layer of random entries. Names come from a small set, so that
// layers of a stack meet each other in every way; containerd may refuse one, for
// example when an entry is below a file. The base layer gets no opaque marks:
// containerd's unpacking of it lets them remove directories that the layer itself
// has but does not describe.
func Random(rng *rand.Rand, base bool) []byte {
	b := NewBuilder()
	var made []string // names that exist in this layer, for hard links
	for range 1 + rng.Intn(40) {
		name := randomName(rng)
		attrs := []Attr{
			Mode(rng.Int63n(0o10000)), Owner(rng.Intn(1<<16), rng.Intn(1<<20)),
			MTime(time.Unix(rng.Int63n(1_700_000_000), rng.Int63n(1_000_000_000))),
		}
		if rng.Intn(5) == 0 {
			attrs = append(attrs, Xattr(fmt.Sprintf("user.x%d", rng.Intn(3)), string(Data(rng.Int63(), rng.Intn(50)))))
		}
		switch n := rng.Intn(20); {
		case n < 6:
			size := sizes[rng.Intn(len(sizes)-2)]
			if rng.Intn(3) > 0 {
				size = rng.Intn(3000)
			}
			data := Data(rng.Int63(), size)
			if rng.Intn(4) == 0 && size > 0 {
				from := rng.Intn(size)
				clear(data[from : from+rng.Intn(size-from)])
			}
			b.File(name, data, attrs...)
			made = append(made, name)
		case n < 11:
			b.Dir(name, attrs...)
		case n < 13:
			target := randomName(rng)
			if rng.Intn(2) == 0 {
				target = strings.Repeat("../", rng.Intn(3)) + target
			} else if rng.Intn(2) == 0 {
				target = "/" + target
			}
			b.Symlink(name, target, attrs...)
		case n < 15:
			b.Whiteout(name)
		case n < 16:
			if !base {
				b.Opaque(name)
			}
		case n < 17:
			b.Device(name, tar.TypeChar, 1+rng.Int63n(100), rng.Int63n(1000), attrs...)
		case n < 18:
			b.Device(name, tar.TypeFifo, 0, 0, attrs...)
		case len(made) > 0:
			target := made[rng.Intn(len(made))]
			if target != name {
				b.Link(name, target, attrs...)
				made = append(made, name)
			}
		}
	}
	return b.Tar()
}

func randomName(rng *rand.Rand) string {
	elements := make([]string, 1+rng.Intn(4))
	for i := range elements {
		elements[i] = string(rune('a' + rng.Intn(4)))
	}
	return strings.Join(elements, "/")
}
