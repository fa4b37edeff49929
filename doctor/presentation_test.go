package doctor

import (
	"strings"
	"testing"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present/choose"
)

func TestPresentations(t *testing.T) {
	no := kind.Errorf(kind.Unsupported, "the kernel has no nbd: modprobe nbd")
	o := Options{
		Presentations:       map[string]error{choose.Fabrics: nil, choose.NBD: no, choose.Fuse: nil},
		PresentationDetails: map[string]string{choose.Fabrics: "over tcp"},
	}
	byCheck := func(o Options) map[string]Finding {
		m := make(map[string]Finding)
		for _, f := range presentations(o) {
			m[f.Check] = f
		}
		return m
	}
	got := byCheck(o)
	for check, want := range map[string]Finding{
		"presentation nvme-fabrics": {State: OK, Detail: "over tcp"},
		"presentation ublk":         {State: None, Detail: "not part"},
		"presentation nbd":          {State: None, Detail: "modprobe nbd"},
		"presentation fuse":         {State: OK, Detail: "usable"},
		string(choose.Remote):       {State: OK, Detail: "by nvme-fabrics: "},
		string(choose.Local):        {State: OK, Detail: "better here, were it usable: ublk"},
		string(choose.Writable):     {State: OK, Detail: "by fuse: "},
	} {
		if f := got[check]; f.State != want.State || !strings.Contains(f.Detail, want.Detail) {
			t.Errorf("%s: %+v, want %+v", check, f, want)
		}
	}
	o.Force = choose.NBD
	if f := byCheck(o)["presentation"]; f.State != Fail || !strings.Contains(f.Detail, "forces") || f.Advice == "" {
		t.Errorf("forcing what does not work: %+v", f)
	}
	o.Force, o.Presentations = "", map[string]error{choose.NBD: no}
	if f := byCheck(o)[string(choose.Local)]; f.State != Fail || f.Advice == "" {
		t.Errorf("nothing works: %+v", f)
	}
	if got := presentations(Options{}); got != nil {
		t.Errorf("without probes: %+v", got)
	}
}
