package nvme

import (
	"bytes"
	"testing"
)

// seed gives a fuzzer one valid PDU of each type and some header bytes.
func seed(f *testing.F) {
	b := make([]byte, 256)
	g := Digests{Header: true, Data: true}
	add := func(n int) { f.Add(bytes.Clone(b[:n]), true, true); f.Add(bytes.Clone(b[:n]), false, false) }
	(&ICReq{MaxR2T: 3}).Put(b)
	add(ICLen)
	(&ICResp{MaxH2CData: 8192}).Put(b)
	add(ICLen)
	add((&Term{Type: TypeC2HTermReq, Status: 1}).Put(b, b[:20]))
	add((&Term{Type: TypeH2CTermReq, Status: 1}).Put(b, b[:20]))
	add(PutCapsuleCmd(b, &Command{Opcode: OpWrite}, 64, g, 4) + 64 + 4)
	add(PutCapsuleResp(b, &Completion{CID: 3}, g))
	add(PutData(b, TypeH2CData, FlagLast, &Data{Length: 32}, g, 4) + 36)
	add(PutData(b, TypeC2HData, FlagLast, &Data{Length: 32}, g, 4) + 36)
	add(PutR2T(b, &Data{Length: 32}, g))
}

// FuzzPDU takes any bytes for a PDU: what is accepted lies within the PDU and within
// the limit, and encodes to the same bytes.
func FuzzPDU(f *testing.F) {
	seed(f)
	const maxData = 512
	f.Fuzz(func(t *testing.T, b []byte, header, data bool) {
		if len(b) < CommonLen {
			return
		}
		g := Digests{Header: header, Data: data}
		c := ParseCommon(b)
		l, err := c.Layout(g, maxData)
		if err != nil {
			return
		}
		if l.Length < 0 || l.Length > maxData || l.Header > MaxHeaderLen+DigestLen || l.Data < l.Header && l.Length > 0 || int64(l.Data+l.Length+l.Digest) != int64(c.PLEN) && l.Length > 0 {
			t.Fatalf("%v of %d bytes has layout %+v", c.Type, c.PLEN, l)
		}
		if len(b) < l.Header {
			return
		}
		out := make([]byte, MaxTermLen)
		same := func(n int) {
			t.Helper()
			if !bytes.Equal(out[:n], b[:n]) {
				t.Fatalf("%v\n%x encodes to\n%x", c.Type, b[:n], out[:n])
			}
		}
		switch c.Type {
		case TypeICReq:
			var r, again ICReq
			if r.Parse(b) == nil {
				r.Put(out)
				if err := again.Parse(out); err != nil || again != r {
					t.Fatalf("%+v comes back as %+v, %v", r, again, err)
				}
			}
		case TypeICResp:
			var r, again ICResp
			if r.Parse(b) == nil {
				r.Put(out)
				if err := again.Parse(out); err != nil || again != r {
					t.Fatalf("%+v comes back as %+v, %v", r, again, err)
				}
			}
		case TypeH2CTermReq, TypeC2HTermReq:
			var r, again Term
			if r.Parse(b) == nil {
				r.Put(out, nil)
				if err := again.Parse(out); err != nil || again != r {
					t.Fatalf("%+v comes back as %+v, %v", r, again, err)
				}
			}
		case TypeCapsuleCmd:
			var cmd Command
			cmd.Parse(b[CommonLen:])
			cmd.Put(out)
			copy(out[36:39], b[CommonLen+36:]) // reserved in the SGL
			if !bytes.Equal(out[:SQELen], b[CommonLen:CommonLen+SQELen]) {
				t.Fatalf("command %+v encodes to %x", cmd, out[:SQELen])
			}
		case TypeCapsuleResp:
			var r Completion
			r.Parse(b[CommonLen:])
			r.Put(out)
			out[14] |= b[CommonLen+14] & 1 // the phase bit is not kept
			if !bytes.Equal(out[:CQELen], b[CommonLen:CommonLen+CQELen]) {
				t.Fatalf("completion %+v encodes to %x", r, out[:CQELen])
			}
		case TypeH2CData, TypeC2HData:
			var d Data
			if d.Parse(b, l.Length) == nil {
				d.put(out)
				same8 := bytes.Equal(out[8:20], b[8:20])
				if !same8 || int(d.Length) != l.Length {
					t.Fatalf("data %+v encodes to %x", d, out[:24])
				}
			}
		case TypeR2T:
			var d Data
			if d.ParseR2T(b) == nil {
				copy(out, b[:8])
				d.put(out)
				same(20)
			}
		}
	})
}

// FuzzStructure takes any bytes for each structure that a peer sends as data.
func FuzzStructure(f *testing.F) {
	b := make([]byte, IdentifyLen)
	(&Controller{Serial: "a"}).Put(b)
	f.Add(bytes.Clone(b))
	(&NvmeNamespace{Blocks: 8, BlockBytes: 512}).Put(b)
	f.Add(bytes.Clone(b))
	(&Descriptors{NGUID: [16]byte{1}}).Put(b)
	f.Add(bytes.Clone(b))
	(&ConnectData{SubNQN: DiscoveryNQN}).Put(b)
	f.Add(bytes.Clone(b[:ConnectDataLen]))
	f.Fuzz(func(t *testing.T, b []byte) {
		var c Controller
		var n NvmeNamespace
		var d Descriptors
		var cd ConnectData
		var e DiscoveryEntry
		var l DiscoveryLog
		_, _, _, _ = c.Parse(b), e.Parse(b), l.Parse(b), cd.Parse(b)
		if len(cd.SubNQN) > 256 || len(cd.HostNQN) > 256 {
			t.Fatalf("an NQN of %d and one of %d bytes", len(cd.SubNQN), len(cd.HostNQN))
		}
		if n.Parse(b) == nil && (n.BlockBytes < 512 || int64(n.Blocks*uint64(n.BlockBytes)) < 0) {
			t.Fatalf("%d blocks of %d bytes", n.Blocks, n.BlockBytes)
		}
		if d.Parse(b) == nil {
			out := make([]byte, IdentifyLen)
			var again Descriptors
			d.Put(out)
			if err := again.Parse(out); err != nil || again != d {
				t.Fatalf("%+v comes back as %+v, %v", d, again, err)
			}
		}
		if ids := ParseList(b, nil); len(ids) > MaxList {
			t.Fatalf("%d identifiers", len(ids))
		}
	})
}
