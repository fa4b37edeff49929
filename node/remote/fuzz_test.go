package remote

import (
	"testing"

	"google.golang.org/protobuf/proto"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
)

// FuzzBlockMap: a map from a store or the database is refused, or covers the block.
func FuzzBlockMap(f *testing.F) {
	for _, m := range []*attacherv1.BlockMap{
		{SizeBytes: 8192, Runs: []*attacherv1.BlockRun{{LengthBytes: 8192}}},
		{SizeBytes: 8192, Owners: [][]byte{make([]byte, 16)}, Runs: []*attacherv1.BlockRun{{LengthBytes: 4096, Owner: 2}, {LengthBytes: 4096, Owner: 1}}},
	} {
		raw, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw, int64(8192))
	}
	f.Fuzz(func(t *testing.T, raw []byte, sizeBytes int64) {
		var m attacherv1.BlockMap
		if proto.Unmarshal(raw, &m) != nil {
			return
		}
		runs, err := runsOf(&m, sizeBytes)
		if err != nil {
			return
		}
		at := int64(0)
		for _, r := range runs {
			if r.OffsetBytes != at || r.LengthBytes <= 0 || r.Owner != [16]byte{} && !r.Data {
				t.Fatalf("run %+v at %d", r, at)
			}
			at += r.LengthBytes
		}
		if at != sizeBytes {
			t.Fatalf("runs end at %d of %d", at, sizeBytes)
		}
	})
}

// FuzzRecord: what a store answers, and what is recorded of it.
func FuzzRecord(f *testing.F) {
	a := &attacherv1.Attachment{
		SubsystemNqn: "nqn.2025-01.io.github.thaw-project:x", HostNqn: "nqn.2014-08.org.nvmexpress:uuid:y",
		HostId: "591b0cf8-1054-58d7-98b1-861b77e3ad87", Uuid: "591b0cf8-1054-58d7-98b1-861b77e3ad88", Nsid: 1, SizeBytes: 512,
		Portals: []*attacherv1.Portal{{Transport: "tcp", Address: "10.0.0.1", Service: "4420"}},
	}
	ceph := &attacherv1.Attachment{
		Block: "b", Transport: "rbd", SizeBytes: 512, Writable: true, WritableId: "rw-1", AttachmentId: "x", Node: "node-a",
		Rbd: &attacherv1.RbdImage{Cluster: "591b0cf8-1054-58d7-98b1-861b77e3ad87", Pool: "p", Image: "i"},
	}
	for _, m := range []*attacherv1.Attachment{a, ceph} {
		raw, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		var a attacherv1.Attachment
		if proto.Unmarshal(raw, &a) != nil {
			return
		}
		r, err := recordOf(&a)
		if err != nil {
			return
		}
		if (len(r.Portals) == 0) != (r.Transport == TransportRBD) || (r.RBD == nil) != (r.Transport != TransportRBD) || r.SizeBytes <= 0 || len(r.addresses()) > maxPortals {
			t.Fatalf("%+v", r)
		}
		// What is recorded says the same again.
		raw, err = encodeRecord(&r)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := decodeRecord([]byte(key("t", "b")), raw); err != nil || !again.equal(r) {
			t.Fatalf("%+v came back as %+v, %v", r, again, err)
		}
	})
}
