package cache

import (
	"errors"
	"io"
	"sync"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/target/bdev"
)

// Device shows a remote device through the cache. It is a bdev.Device, read-only.
type Device struct {
	c      *Cache
	remote bdev.Device
	layout *layout

	mu     sync.RWMutex
	closed bool           // guarded by mu
	ops    sync.WaitGroup // under way; added to under mu while not closed

	streams streams
	leaving bool // guarded by Cache.pace.mu: read-ahead is not to wait for its turn
}

var _ bdev.Device = (*Device)(nil)

func (d *Device) enter() error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.closed {
		return kind.Errorf(kind.Unavailable, "the cached device is closed")
	}
	d.ops.Add(1)
	return nil
}

// Close closes the remote, which ends reads that wait for it, and waits for all of
// them. A second Close does nothing.
func (d *Device) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	d.mu.Unlock()
	d.c.pace.leave(d)
	err := d.remote.Close()
	d.ops.Wait()
	d.c.mu.Lock()
	delete(d.c.devices, d)
	d.c.mu.Unlock()
	return err
}

// SizeBytes is the remote's size when the device was made.
func (d *Device) SizeBytes() int64 { return d.layout.sizeBytes }

// ReadOnly is true.
func (d *Device) ReadOnly() bool { return true }

// Flush does nothing: there is nothing to flush.
func (d *Device) Flush() error { return nil }

func errReadOnly(op string) error {
	return kind.Errorf(kind.ReadOnly, "%s a cached device: it is read-only", op)
}

// WriteAt fails with kind.ReadOnly.
func (d *Device) WriteAt([]byte, int64) (int, error) { return 0, errReadOnly("write") }

// Discard fails with kind.ReadOnly.
func (d *Device) Discard(int64, int64) error { return errReadOnly("discard") }

// WriteZeroes fails with kind.ReadOnly.
func (d *Device) WriteZeroes(int64, int64) error { return errReadOnly("zero") }

// Extent tells, for front-ends that can skip holes, how many bytes from offset, at most
// lengthBytes, are alike: a hole, which reads as zeros, or not.
func (d *Device) Extent(offset, lengthBytes int64) (n int64, hole, zero bool, err error) {
	if offset < 0 || lengthBytes <= 0 || offset >= d.layout.sizeBytes {
		return 0, false, false, kind.Errorf(kind.Invalid, "extent of %d bytes at %d: the device has %d", lengthBytes, offset, d.layout.sizeBytes)
	}
	i := d.layout.find(offset)
	hole = d.layout.runs[i].class == classZero
	end := d.layout.end(i)
	for i++; end < d.layout.sizeBytes && end-offset < lengthBytes && (d.layout.runs[i].class == classZero) == hole; i++ {
		end = d.layout.end(i)
	}
	return min(lengthBytes, end-offset), hole, hole, nil
}

// ReadAt reads as io.ReaderAt does. Errors are the remote's; a cache that fails costs
// time only.
func (d *Device) ReadAt(p []byte, off int64) (int, error) {
	size := d.layout.sizeBytes
	switch {
	case off < 0:
		return 0, kind.Errorf(kind.Invalid, "read a cached device at %d", off)
	case len(p) == 0:
		return 0, nil
	case off >= size:
		return 0, io.EOF
	}
	var atEnd error
	if int64(len(p)) > size-off {
		p, atEnd = p[:size-off], io.EOF
	}
	if err := d.enter(); err != nil {
		return 0, err
	}
	defer d.ops.Done()
	stream := d.streams.note(d, off, int64(len(p)))
	for n := 0; n < len(p); {
		m, err := d.read(p[n:], off+int64(n), stream)
		n += m
		if err != nil {
			return n, err
		}
	}
	return len(p), atEnd
}

// read fills a first part of p, which is inside the device, and returns its length.
func (d *Device) read(p []byte, at int64, stream int) (int, error) {
	unit := int64(d.c.unit)
	start := at &^ (unit - 1)
	n := min(len(p), int(unit-(at-start)))
	switch class, k := d.layout.unit(start); class {
	case classZero:
		clear(p[:n])
		return n, nil
	case classKept:
		return d.readKept(p, n, at, k, stream)
	}
	for next := start + unit; n < len(p); next += unit { // as many more as are passed through
		if class, _ := d.layout.unit(next); class != classDirect {
			break
		}
		n = min(len(p), int(next+unit-at))
	}
	return d.readRemote(p[:n], at)
}

// readRemote reads past the cache.
func (d *Device) readRemote(p []byte, at int64) (int, error) {
	d.c.pace.demand(1)
	defer d.c.pace.demand(-1)
	n, err := d.remote.ReadAt(p, at)
	d.c.count.passedBytes.Add(uint64(n))
	switch {
	case n == len(p):
		return n, nil
	case err == nil || errors.Is(err, io.EOF):
		// The remote is not as long as it was: not the end of this device.
		err = kind.Errorf(kind.IO, "read from the remote at %d: only %d bytes of %d arrived", at, n, len(p))
	}
	return n, err
}

// readKept fills n bytes of p from the unit of key k. When it must fetch that it fetches
// what else of p is missing next to it too, and fills more.
func (d *Device) readKept(p []byte, n int, at int64, k key, stream int) (int, error) {
	c := d.c
	s := c.shard(k)
	in := int(at) & (c.unit - 1)
	for range maxTries {
		s.mu.Lock()
		if t, ok := s.take(k, in, n); ok {
			s.mu.Unlock()
			if t.ahead {
				d.streams.push(d, stream)
			}
			if c.read(s, t, p[:n], in) {
				return n, nil
			}
			continue
		}
		ref, ok := s.flights[k]
		if !ok && c.paused() {
			s.mu.Unlock()
			return d.pass(p, n, at)
		}
		if !ok {
			f := newFlight()
			s.flights[k] = flightRef{f: f, n: int(min(int64(c.unit), d.layout.sizeBytes-at+int64(in)))}
			s.mu.Unlock()
			d.streams.push(d, stream)
			return d.lead(f, p, n, at, k)
		}
		ref.f.refs.Add(1)
		ref.joined = true
		s.flights[k] = ref
		s.mu.Unlock()
		c.count.joins.Add(1)
		d.streams.push(d, stream)
		<-ref.f.done
		ok = ref.f.err == nil && in+n <= ref.n
		if ok {
			copy(p[:n], ref.f.buf.b[ref.off+in:])
		}
		c.release(ref.f)
		if ok {
			return n, nil
		}
	}
	return d.readRemote(p[:n], at)
}

// pass reads past the cache n bytes of p, which end with their unit unless p does, and
// those of the units that follow and are not there either.
func (d *Device) pass(p []byte, n int, at int64) (int, error) {
	unit := int64(d.c.unit)
	for n < len(p) {
		next := at + int64(n)
		class, k := d.layout.unit(next)
		if class != classKept || d.c.has(k, int(min(unit, d.layout.sizeBytes-next))) {
			break
		}
		n = min(len(p), n+int(unit))
	}
	return d.readRemote(p[:n], at)
}

// lead fetches by f the unit of k, which f has claimed, and those of p that follow and
// are missing.
func (d *Device) lead(f *flight, p []byte, n int, at int64, k key) (int, error) {
	c := d.c
	c.count.misses.Add(1)
	start := at &^ int64(c.unit-1)
	keys, end := d.claimMore(f, append(make([]key, 0, 8), k), start, at+int64(len(p)))
	c.pace.demand(1)
	filled := int(min(int64(len(p)), end-at))
	err := c.fetch(f, d.remote, keys, start, end, int(at-start), int(at-start)+filled)
	c.pace.demand(-1)
	if err == nil {
		copy(p[:filled], f.buf.b[at-start:])
		c.count.missBytes.Add(uint64(filled))
	}
	c.release(f)
	switch kind.Of(err) {
	case "":
		if err == nil {
			return filled, nil
		}
	case kind.Unavailable, kind.Canceled, kind.Denied:
		return 0, err // nobody is there; asking once more would double the wait
	}
	// Perhaps the bytes that were asked for are good, and only some that were fetched
	// with them are not.
	return d.readRemote(p[:n], at)
}

// claimMore claims for f units from the one at start on, whose key keys has if f has it
// already, up to the one that holds stop.
func (d *Device) claimMore(f *flight, keys []key, start, stop int64) ([]key, int64) {
	unit := int64(d.c.unit)
	size := d.layout.sizeBytes
	end := min(start+int64(len(keys))*unit, size)
	for end < min(stop, size) && end+unit-start <= maxFetchBytes {
		class, k := d.layout.unit(end)
		n := min(unit, size-end)
		if class != classKept || !d.c.claim(f, k, int(end-start), int(n)) {
			break
		}
		keys = append(keys, k)
		end += n
	}
	return keys, end
}
