// Package choose decides which presentation shows a disk, and shows it with that one.
//
// It is handed the presenters and what keeps each from working on this machine, and
// imports none of them.
package choose

import (
	"fmt"
	"slices"
	"strings"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
)

// The names of the presentations, as configuration and doctor write them.
const (
	Fabrics = "nvme-fabrics"
	Ublk    = "ublk"
	NBD     = "nbd"
	Fuse    = "fuse"
)

// Names are all of them.
func Names() []string { return []string{Fabrics, Ublk, NBD, Fuse} }

// Class is what matters of a disk for the choice.
type Class string

// The classes of disks.
const (
	// Remote is a read-only lvol that another machine stores.
	Remote Class = "blocks of other machines"
	// Local is a read-only lvol that this machine stores.
	Local Class = "blocks of this machine"
	// Writable is a qcow2 image over either, or a writable lvol.
	Writable Class = "writable disks"
)

// Classes are all of them, in the order in which people think of them.
func Classes() []Class { return []Class{Remote, Local, Writable} }

// ClassOf returns the class of a disk.
func ClassOf(source present.Source, readOnly bool) Class {
	switch {
	case source.Kind != present.SourceLvol || !readOnly:
		return Writable
	case source.Target != "":
		return Remote
	}
	return Local
}

// preference is one presentation for a class, with why it stands where it does.
type preference struct {
	name, why string
}

// preferences has the best first. docs/presentation.md has the measurements behind it.
var preferences = map[Class][]preference{
	Remote: {
		{Fabrics, "the kernel itself moves the data: no process of ours is in the way, or can be missed"},
		{Ublk, "the least copying and switching of those served by a process"},
		{Fuse, "EROFS mounts its files directly, and what was under way when the server died goes on at once"},
		{NBD, "works where there is nothing else, with a socket in between"},
	},
	Local: {
		{Ublk, "the least copying and switching of those served by a process"},
		{Fuse, "EROFS mounts its files directly, and what was under way when the server died goes on at once"},
		{NBD, "works where there is nothing else, with a socket in between"},
	},
	Writable: {
		{Ublk, "a block device with queues of its own, no socket and no loop device in between"},
		{Fuse, "through a loop device, with requests in parallel, and what was under way when the server died goes on at once"},
		{NBD, "a block device, with one connection for all requests"},
	},
}

// serves tells whether a presentation can show disks of a class at all.
func serves(name string, class Class) bool {
	return slices.ContainsFunc(preferences[class], func(p preference) bool { return p.name == name })
}

// Rejected is a presentation that would have been preferred.
type Rejected struct {
	Name string `json:"name"`
	Why  string `json:"why"`
}

// Decision is what shows the disks of a class.
type Decision struct {
	Class Class `json:"class"`
	// Name is empty when nothing can show them.
	Name     string     `json:"name"`
	Why      string     `json:"why"`
	Rejected []Rejected `json:"rejected,omitempty"`
}

// Decide chooses for each class. unusable has an entry for each presentation there is, nil
// when it works and else why it does not; one without an entry is not part of this build.
// force, if not empty, is the only presentation for the classes that it can show; the
// others are chosen as if it were empty, because a node needs them all. It is kind.Invalid
// for a name that does not exist, and of the kind of the reason when the forced one does
// not work or a class has nothing to show it.
func Decide(unusable map[string]error, force string) ([]Decision, error) {
	if force != "" && !slices.Contains(Names(), force) {
		return nil, kind.Errorf(kind.Invalid, "presentation %.40q does not exist: it is one of %s, or empty for the best that works", force, strings.Join(Names(), ", "))
	}
	if force != "" {
		if err := usable(unusable, force); err != nil {
			return nil, fmt.Errorf("the configuration forces presentation %s, which does not work here: %w", force, err)
		}
	}
	var list []Decision
	for _, class := range Classes() {
		d := Decision{Class: class}
		for _, p := range preferences[class] {
			err := usable(unusable, p.name)
			if force != "" && p.name != force && serves(force, class) {
				continue // not even looked at
			}
			if err == nil {
				d.Name, d.Why = p.name, p.why
				if p.name == force {
					d.Why = "the configuration forces it"
				}
				break
			}
			d.Rejected = append(d.Rejected, Rejected{p.name, err.Error()})
		}
		list = append(list, d)
	}
	for _, d := range list {
		if d.Name == "" {
			return list, kind.Errorf(kind.Unsupported, "nothing on this machine can show %s: see 'thaw doctor'", d.Class)
		}
	}
	return list, nil
}

func usable(unusable map[string]error, name string) error {
	err, known := unusable[name]
	if !known {
		return kind.Errorf(kind.Unsupported, "it is not part of this program")
	}
	return err
}
