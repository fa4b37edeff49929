package host

import (
	"io"
	"sync/atomic"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/nvme"
	"github.com/thaw-project/thaw/target/bdev"
)

// Device is an nvmeNamespace as a bdev.Device. Accesses that begin and end at block
// boundaries go to the target as they are; the rest reads or rewrites the blocks at
// its edges, during which no other write of this Host to the nvmeNamespace runs.
type Device struct {
	h     *Host
	s     *shared
	nsid  uint32
	block int64 // bytes

	closed atomic.Bool
}

var _ bdev.Device = (*Device)(nil)

// SizeBytes is the size as last heard of.
func (d *Device) SizeBytes() int64 { return d.s.ns.Load().SizeBytes }

// ReadOnly tells whether the target refuses writes.
func (d *Device) ReadOnly() bool { return d.s.ns.Load().ReadOnly }

// Info describes the nvmeNamespace as last heard of.
func (d *Device) Info() NvmeNamespace { return *d.s.ns.Load() }

// Close makes I/O that waits for a path fail with kind.Unavailable. The Host owns the
// connections and keeps them.
func (d *Device) Close() error {
	if !d.closed.Swap(true) {
		d.h.wake()
	}
	return nil
}

func (d *Device) check(what string, off, length int64) error {
	if off < 0 || length < 0 || off > d.SizeBytes() || length > d.SizeBytes()-off {
		return kind.Errorf(kind.Invalid, "%s of %d bytes at %d of nvmeNamespace %d with %d bytes", what, length, off, d.nsid, d.SizeBytes())
	}
	return nil
}

// max is how much one command moves.
func (d *Device) max() int64 { return min(d.h.max.Load(), nvme.MaxBlocks*d.block) }

// transfer moves whole blocks, in commands of at most the target's MDTS.
func (d *Device) transfer(op uint8, dir direction, p []byte, off int64) error {
	for len(p) > 0 {
		n := min(int64(len(p)), d.max())
		cmd := nvme.Command{Opcode: op, NSID: d.nsid, CDW12: uint32(n/d.block - 1)}
		cmd.SetSLBA(uint64(off / d.block))
		if err := d.h.do(d, &cmd, dir, p[:n]); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// ReadAt implements io.ReaderAt.
func (d *Device) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, d.check("read", off, int64(len(p)))
	}
	var eof error
	if size := d.SizeBytes(); off > size {
		return 0, io.EOF
	} else if int64(len(p)) > size-off {
		p, eof = p[:size-off], io.EOF
	}
	if err := d.read(p, off); err != nil {
		return 0, err
	}
	return len(p), eof
}

func (d *Device) read(p []byte, off int64) error {
	if off%d.block == 0 && int64(len(p))%d.block == 0 {
		return d.transfer(nvme.OpRead, toHost, p, off)
	}
	head, end := off%d.block, off+int64(len(p))
	if head != 0 || int64(len(p)) < d.block {
		b := make([]byte, d.block)
		if err := d.transfer(nvme.OpRead, toHost, b, off-head); err != nil {
			return err
		}
		n := copy(p, b[head:])
		p, off = p[n:], off+int64(n)
	}
	whole := int64(len(p)) / d.block * d.block
	if err := d.transfer(nvme.OpRead, toHost, p[:whole], off); err != nil {
		return err
	}
	if p = p[whole:]; len(p) > 0 {
		b := make([]byte, d.block)
		if err := d.transfer(nvme.OpRead, toHost, b, end-int64(len(p))); err != nil {
			return err
		}
		copy(p, b)
	}
	return nil
}

// WriteAt implements io.WriterAt.
func (d *Device) WriteAt(p []byte, off int64) (int, error) {
	if err := d.check("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	if d.ReadOnly() {
		return 0, kind.Errorf(kind.ReadOnly, "write to nvmeNamespace %d: it is read-only", d.nsid)
	}
	var err error
	if off%d.block == 0 && int64(len(p))%d.block == 0 {
		d.s.edit.RLock()
		err = d.transfer(nvme.OpWrite, toTarget, p, off)
		d.s.edit.RUnlock()
	} else {
		d.s.edit.Lock()
		err = d.rewrite(p, off)
		d.s.edit.Unlock()
	}
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// rewrite writes what does not lie at block boundaries. It is called with edit held.
func (d *Device) rewrite(p []byte, off int64) error {
	start := off / d.block * d.block
	end := (off + int64(len(p)) + d.block - 1) / d.block * d.block
	b := make([]byte, min(end-start, d.max()))
	for start < end {
		n := min(end-start, int64(len(b)))
		if off > start || off+int64(len(p)) < start+n {
			if err := d.transfer(nvme.OpRead, toHost, b[:n], start); err != nil {
				return err
			}
		}
		c := copy(b[off-start:n], p)
		if err := d.transfer(nvme.OpWrite, toTarget, b[:n], start); err != nil {
			return err
		}
		p, off, start = p[c:], off+int64(c), start+n
	}
	return nil
}

// Flush implements bdev.Device.
func (d *Device) Flush() error {
	return d.h.do(d, &nvme.Command{Opcode: nvme.OpFlush, NSID: d.nsid}, none, nil)
}

// Discard implements bdev.Device. It uses Write Zeroes with leave to deallocate: a
// Dataset Management command is a hint, after which blocks may read as before.
func (d *Device) Discard(off, length int64) error { return d.zero("discard", off, length) }

// WriteZeroes implements bdev.Device.
func (d *Device) WriteZeroes(off, length int64) error { return d.zero("write zeroes", off, length) }

func (d *Device) zero(what string, off, length int64) error {
	if err := d.check(what, off, length); err != nil {
		return err
	}
	if d.ReadOnly() {
		return kind.Errorf(kind.ReadOnly, "%s of nvmeNamespace %d: it is read-only", what, d.nsid)
	}
	start, end := (off+d.block-1)/d.block*d.block, (off+length)/d.block*d.block
	if start > end {
		// Within one block.
		_, err := d.WriteAt(make([]byte, length), off)
		return err
	}
	if start > off {
		if _, err := d.WriteAt(make([]byte, start-off), off); err != nil {
			return err
		}
	}
	d.s.edit.RLock()
	err := d.zeroBlocks(start, end)
	d.s.edit.RUnlock()
	if err == nil && off+length > end {
		_, err = d.WriteAt(make([]byte, off+length-end), end)
	}
	return err
}

func (d *Device) zeroBlocks(start, end int64) error {
	info := d.s.ns.Load()
	ct := d.h.live.Load()
	if ct != nil && ct.id.ONCS&nvme.ONCSWriteZeroes == 0 {
		b := make([]byte, min(end-start, d.max()))
		for ; start < end; start += int64(len(b)) {
			if err := d.transfer(nvme.OpWrite, toTarget, b[:min(end-start, int64(len(b)))], start); err != nil {
				return err
			}
		}
		return nil
	}
	for start < end {
		n := min(end-start, nvme.MaxBlocks*d.block)
		cmd := nvme.Command{Opcode: nvme.OpWriteZeroes, NSID: d.nsid, CDW12: uint32(n/d.block - 1)}
		if info.id.DLFEAT&nvme.DLFEATDeallocate != 0 && info.id.DLFEAT&nvme.DLFEATZerosMask == nvme.DLFEATZeros {
			cmd.CDW12 |= nvme.CDW12Deallocate
		}
		cmd.SetSLBA(uint64(start / d.block))
		if err := d.h.do(d, &cmd, none, nil); err != nil {
			return err
		}
		start += n
	}
	return nil
}
