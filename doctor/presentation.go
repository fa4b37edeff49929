package doctor

import (
	"fmt"
	"strings"

	"github.com/thaw-project/thaw/node/present/choose"
)

// presentations tells of each presentation whether it can be used, and of each class of
// disks which one would show them and why.
func presentations(o Options) []Finding {
	if o.Presentations == nil {
		return nil
	}
	var findings []Finding
	for _, name := range choose.Names() {
		f := Finding{Check: "presentation " + name, State: OK, Detail: "usable"}
		err, known := o.Presentations[name]
		switch {
		case !known:
			f.State, f.Detail = None, "not part of this program"
		case err != nil:
			f.State, f.Detail = None, err.Error()
		case o.PresentationDetails[name] != "":
			f.Detail += ": " + o.PresentationDetails[name]
		}
		findings = append(findings, f)
	}
	decisions, err := choose.Decide(o.Presentations, o.Force)
	if decisions == nil { // the configuration cannot be followed
		return append(findings, Finding{"presentation", Fail, err.Error(), "correct 'presentation' in the configuration, or what the forced one lacks"})
	}
	for _, d := range decisions {
		f := Finding{Check: string(d.Class), State: OK, Detail: fmt.Sprintf("by %s: %s", d.Name, d.Why)}
		if d.Name == "" {
			f.State, f.Detail = Fail, "nothing can show them"
			f.Advice = "make one of the presentations above usable"
		} else if len(d.Rejected) > 0 {
			var names []string
			for _, r := range d.Rejected {
				names = append(names, r.Name)
			}
			f.Detail += " (better here, were it usable: " + strings.Join(names, ", ") + ")"
		}
		findings = append(findings, f)
	}
	return findings
}
