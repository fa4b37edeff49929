package lvol

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/lvol/device"
)

// wholeMap asks for the map in parts of at most maxRuns.
func wholeMap(s *Store, name string, maxRuns int) ([]Run, error) {
	var runs []Run
	for at := int64(0); ; {
		m, err := s.Map(name, at, maxRuns)
		if err != nil {
			return nil, err
		}
		if len(m.Runs) > maxRuns || m.Runs[0].OffsetBytes != at || m.NextBytes <= at {
			return nil, fmt.Errorf("part at %d: %+v", at, m)
		}
		runs = append(runs, m.Runs...)
		if at = m.NextBytes; at == m.SizeBytes {
			break
		}
	}
	at := int64(0)
	for _, r := range runs {
		if r.OffsetBytes != at || r.LengthBytes <= 0 {
			return nil, fmt.Errorf("run %+v where %d was next", r, at)
		}
		at += r.LengthBytes
	}
	m, err := s.Map(name, 0, 1)
	if i, err2 := s.Get(name); err != nil || err2 != nil || at != i.SizeBytes || m.UUID != i.UUID {
		return nil, fmt.Errorf("map ends at %d of %d: %v", at, i.SizeBytes, err)
	}
	return runs, nil
}

// mapKey is what a cache knows a block by.
type mapKey struct {
	owner [16]byte
	at    int64
}

// seen remembers what every key ever meant: the bytes of a cluster, or as many of
// them as the lvol that showed it had.
type seen map[mapKey]seenBlock

type seenBlock struct {
	n    int // bytes
	sums [][sha256.Size]byte
}

// learn looks at all read-only lvols of the store. A key that means other bytes than
// it did fails, as does a run without data that is not zero.
func (k seen) learn(s *Store, maxRuns int) (owned int, err error) {
	list, err := s.List()
	if err != nil {
		return 0, err
	}
	for _, i := range list {
		if !i.ReadOnly {
			if _, err := s.Map(i.Name, 0, 0); !errors.Is(err, kind.Invalid) {
				return 0, fmt.Errorf("map of the writable lvol %s: %v", i.Name, err)
			}
			continue
		}
		n, err := k.learnOne(s, i, maxRuns)
		if err != nil {
			return 0, fmt.Errorf("lvol %s: %w", i.Name, err)
		}
		owned += n
	}
	return owned, nil
}

func (k seen) learnOne(s *Store, i Info, maxRuns int) (owned int, err error) {
	runs, err := wholeMap(s, i.Name, maxRuns)
	if err != nil {
		return 0, err
	}
	d, err := s.OpenLvol(i.Name, true)
	if err != nil {
		return 0, err
	}
	defer d.Close()
	for _, r := range runs {
		p := make([]byte, r.LengthBytes)
		if _, err := d.ReadAt(p, r.OffsetBytes); err != nil {
			return 0, err
		}
		if !r.Data {
			if r.Owner != ([16]byte{}) || len(bytes.TrimLeft(p, "\x00")) > 0 {
				return 0, fmt.Errorf("run %+v has data", r)
			}
			continue
		}
		if r.Owner == ([16]byte{}) {
			continue
		}
		owned++
		for at := int64(0); at < r.LengthBytes; at += i.ClusterBytes {
			part := p[at:min(at+i.ClusterBytes, r.LengthBytes)]
			if err := k.check(mapKey{r.Owner, r.OffsetBytes + at}, part); err != nil {
				return 0, err
			}
		}
	}
	return owned, nil
}

func (k seen) check(key mapKey, p []byte) error {
	b := k[key]
	for n := 0; n < len(p); n += 512 {
		sum := sha256.Sum256(p[n : n+512])
		switch i := n / 512; {
		case i == len(b.sums):
			b.sums = append(b.sums, sum)
		case b.sums[i] != sum:
			return fmt.Errorf("%x at %d means other bytes than it did", key.owner, key.at+int64(n))
		}
	}
	b.n = max(b.n, len(p))
	k[key] = b
	return nil
}

// TestMapKeysAreForEver does random operations on a pool, power losses and kills
// included, and after each looks at everything that can be cached: an owner and an
// offset must mean the same bytes as ever.
func TestMapKeysAreForEver(t *testing.T) {
	owned := 0
	for _, seed := range seeds(t, 12) {
		owned += mapRun(t, seed)
	}
	if owned == 0 {
		t.Error("no run had an owner")
	}
}

func mapRun(t *testing.T, seed uint64) (owned int) {
	const capacity = 128 << 20
	r := rand.New(rand.NewPCG(seed, 5))
	dev := device.NewCrash(capacity)
	dir := filepath.Join(fastDir(t), "pool")
	o := Options{Dir: dir, FlushInterval: -1, BallastBytes: -1}
	o.OpenDevice = func() (device.Device, error) { return dev, nil }
	ok(t, Create(CreateOptions{Dir: dir, ClusterBytes: 16 << 10 << r.IntN(4), OpenDevice: o.OpenDevice}))
	s, err := Open(o)
	ok(t, err)
	defer func() { s.Close() }()
	g, m, keys := newGenerator(seed, 5<<20), newModel(), seen{}
	var next []op
	for step := range 150 {
		op := g.op(m)
		if len(next) > 0 {
			op, next = next[0], next[1:]
		} else if r.IntN(3) == 0 && len(m.lvols) > 0 { // more of what moves deltas
			op.verb, op.name, op.to = []string{"snapshot", "clone", "delete", "readonly"}[r.IntN(4)], g.used(m), g.name()
			if op.verb == "readonly" { // seen read-only, changed, and seen again
				thaw, write, freeze := op, op, op
				op.cut, thaw.cut, freeze.cut = true, false, true
				write.verb = "write"
				write.off, write.n = g.span(m, op.name)
				next = append(next, thaw, write, freeze)
			}
		}
		if len(m.lvols) > 6 && (op.verb == "create" || op.verb == "clone" || op.verb == "snapshot") {
			continue
		}
		if op.verb == "reopen" {
			switch r.IntN(3) {
			case 0: // power loss: the model of the data no longer holds, the keys do
				image := dev.Image(r.Uint64())
				kill(s)
				dev = device.FromImage(image)
				logs, _ := filepath.Glob(filepath.Join(dir, "redo.*"))
				for _, l := range logs { // lost with the power
					ok(t, os.Remove(l))
				}
			case 1:
				kill(s)
			default:
				ok(t, s.Close())
			}
			if s, err = Open(o); err != nil {
				t.Fatalf("seed %d, step %d %v: %v", seed, step, op, err)
			}
		} else {
			_ = applyStore(s, op) // that it does what it should, others test
		}
		m.apply(op)
		n, err := keys.learn(s, 1+r.IntN(40))
		if err != nil {
			t.Fatalf("seed %d, after step %d %v: %v", seed, step, op, err)
		}
		owned += n
	}
	return owned
}

// TestMapOfAChain is the shape of a converted image: a read-only clone of snapshots.
func TestMapOfAChain(t *testing.T) {
	s := newPool(t, 64<<20, 64<<10, nil)
	const c = 64 << 10
	_, err := s.Create("w", 8<<20+512)
	ok(t, err)
	write := func(first, last int) {
		l, err := s.OpenLvol("w", false)
		ok(t, err)
		defer l.Close()
		_, err = l.WriteAt(bytes.Repeat([]byte{byte(first + 1)}, (last-first)*c), int64(first)*c)
		ok(t, err)
	}
	write(0, 4)
	base, err := s.Snapshot("w", "base")
	ok(t, err)
	write(3, 6)
	top, err := s.Snapshot("w", "top")
	ok(t, err)
	_, err = s.Clone("top", "leaf")
	ok(t, err)
	_, err = s.SetReadOnly("leaf", true)
	ok(t, err)
	want := func(name string, list ...string) {
		t.Helper()
		runs, err := wholeMap(s, name, 100)
		ok(t, err)
		var have []string
		for _, r := range runs {
			who := "zero"
			switch {
			case r.Data && uuid(r.Owner).String() == base.UUID:
				who = "base"
			case r.Data && uuid(r.Owner).String() == top.UUID:
				who = "top"
			case r.Data:
				who = "nobody"
			}
			have = append(have, fmt.Sprintf("%s %d", who, r.LengthBytes))
		}
		if fmt.Sprint(have) != fmt.Sprint(list) {
			t.Errorf("map of %s: %v, want %v", name, have, list)
		}
	}
	rest := fmt.Sprintf("zero %d", 8<<20+512-6*c)
	for _, name := range []string{"top", "leaf"} {
		want(name, fmt.Sprintf("base %d", 3*c), fmt.Sprintf("top %d", 3*c), rest)
	}
	want("base", fmt.Sprintf("base %d", 4*c), fmt.Sprintf("zero %d", 8<<20+512-4*c))
	if _, err := s.Map("w", 0, 0); !errors.Is(err, kind.Invalid) {
		t.Errorf("map of a writable lvol: %v", err)
	}
	if _, err := s.Map("leaf", 512, 0); !errors.Is(err, kind.Invalid) {
		t.Errorf("map from the middle of a cluster: %v", err)
	}
	if _, err := s.Map("none", 0, 0); !errors.Is(err, kind.NotFound) {
		t.Errorf("map of no lvol: %v", err)
	}
	// The base goes: what it owned is the next snapshot's, which had it all along.
	ok(t, s.Delete("base"))
	want("leaf", fmt.Sprintf("top %d", 6*c), rest)
	// Then the leaf inherits, which may become writable: nobody's.
	ok(t, s.Delete("w"))
	ok(t, s.Delete("top"))
	want("leaf", fmt.Sprintf("nobody %d", 6*c), rest)
	s = reopen(t, s)
	want("leaf", fmt.Sprintf("nobody %d", 6*c), rest)
}
