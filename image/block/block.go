// Package block derives the names of a converted image's blocks.
//
// A block is one lvol, named <scope>-<uuid>. The uuid is a fixed function of what
// the block holds, so that a retry, another converter and a sweep agree on it and
// the same input gives the same manifest. The package knows nothing of storage.
package block

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/google/uuid"
	"github.com/opencontainers/go-digest"

	"github.com/thaw-project/thaw/kind"
)

// Mode is the image mode.
type Mode string

// The image modes: see Words in the design.
const (
	ModeOverlayfs Mode = "overlayfs"
	ModeOverlaybd Mode = "overlaybd"
)

// Filesystem is the file system inside a block.
type Filesystem string

// The file systems.
const (
	Ext4  Filesystem = "ext4"
	Erofs Filesystem = "erofs"
)

// Scope says who may share a block.
type Scope string

// The scopes. Each block is a clone of the one before.
const (
	Global  Scope = "global"  // any repository
	Local   Scope = "local"   // images of one repository
	Soldier Scope = "soldier" // one image: the leaf that nodes attach
)

// Layout is the version of what converters write into blocks. It is part of every
// name: a change of layout gives other blocks instead of misread ones.
const Layout = 1

// Spec is what a block's content depends on.
type Spec struct {
	Mode        Mode
	Filesystem  Filesystem
	VirtualSize int64         // bytes
	ChainID     digest.Digest // of the layers the block holds
}

// space is the name space of block uuids (RFC 9562, version 5), fixed for ever.
var space = uuid.NewSHA1(uuid.NameSpaceURL, []byte("https://github.com/thaw-project/thaw/block"))

func (s Spec) name(scope Scope, owner string) string {
	id := fmt.Sprintf("%d|%s|%s|%s|%d|%s|%s", Layout, scope, s.Mode, s.Filesystem, s.VirtualSize, s.ChainID, owner)
	return string(scope) + "-" + uuid.NewSHA1(space, []byte(id)).String()
}

// GlobalName names the block of a chain that any repository shares.
func (s Spec) GlobalName() string { return s.name(Global, "") }

// LocalName names the block of a chain that images of one repository share.
func (s Spec) LocalName(repository string) string { return s.name(Local, repository) }

// SoldierName names the leaf block of one image: a source config in a repository.
func (s Spec) SoldierName(repository string, config digest.Digest) string {
	return s.name(Soldier, repository+"|"+config.String())
}

var pattern = regexp.MustCompile(`^(global|local|soldier)-[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

// ParseName checks that name is a block name and returns its scope.
func ParseName(name string) (Scope, error) {
	if !pattern.MatchString(name) {
		return "", kind.Errorf(kind.Invalid, "block name %.80q is not <global|local|soldier>-<uuid>", name)
	}
	scope, _, _ := strings.Cut(name, "-")
	return Scope(scope), nil
}

// ParseMode parses an image mode.
func ParseMode(s string) (Mode, error) {
	switch m := Mode(s); m {
	case ModeOverlayfs, ModeOverlaybd:
		return m, nil
	}
	return "", kind.Errorf(kind.Invalid, "image mode %.40q: must be overlayfs or overlaybd", s)
}

// ParseFilesystem parses a file system name.
func ParseFilesystem(s string) (Filesystem, error) {
	switch f := Filesystem(s); f {
	case Ext4, Erofs:
		return f, nil
	}
	return "", kind.Errorf(kind.Invalid, "file system %.40q: must be ext4 or erofs", s)
}
