package source

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/image/registry"
	"github.com/thaw-project/thaw/image/spool"
	"github.com/thaw-project/thaw/kind"
)

// files is where the files of a layout are: a directory or an archive.
type files interface {
	// open opens the regular file with a slash-separated, clean, relative name.
	open(name string) (spool.File, int64, error)
	Close() error
}

// fromLayout is an image in an OCI image layout.
type fromLayout struct {
	reference string
	files     files
	root      ocispec.Descriptor
}

func openLayout(reference, path, tag string) (Source, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("open image layout: %w", err)
	}
	if !info.IsDir() {
		return nil, kind.Errorf(kind.Invalid, "image layout %s is not a directory: an archive is oci-archive:FILE", path)
	}
	return newLayout(reference, directory(path), tag)
}

func openLayoutArchive(ctx context.Context, reference, path, tag, spoolDir string) (Source, error) {
	a, err := openArchive(ctx, path, spoolDir)
	if err != nil {
		return nil, err
	}
	return newLayout(reference, a, tag)
}

func newLayout(reference string, f files, tag string) (_ Source, err error) {
	s := &fromLayout{reference: reference, files: f}
	defer func() {
		if err != nil {
			f.Close()
			err = fmt.Errorf("open %s: %w", reference, err)
		}
	}()
	raw, err := readFile(f, ocispec.ImageLayoutFile)
	if err != nil {
		return nil, fmt.Errorf("not an OCI image layout: %w", err)
	}
	var layout ocispec.ImageLayout
	if json.Unmarshal(raw, &layout) != nil || !strings.HasPrefix(layout.Version, "1.") {
		return nil, kind.Errorf(kind.Unsupported, "image layout version %.20q: this program knows %s", layout.Version, ocispec.ImageLayoutVersion)
	}
	if raw, err = readFile(f, ocispec.ImageIndexFile); err != nil {
		return nil, err
	}
	var index ocispec.Index
	if err := Decode("index.json", raw, &index); err != nil {
		return nil, err
	}
	if s.root, err = choose(index.Manifests, tag); err != nil {
		return nil, err
	}
	if err := SupportedDigest(s.root.Digest); err != nil {
		return nil, err
	}
	if raw, err = s.Manifest(context.Background(), s.root); err != nil {
		return nil, err
	}
	if inside := mediaTypeInside(raw); inside != "" {
		s.root.MediaType = inside
	}
	return s, nil
}

// choose picks the image of a layout's index.json that tag names, or the only one.
func choose(manifests []ocispec.Descriptor, tag string) (ocispec.Descriptor, error) {
	var tags []string
	var found []ocispec.Descriptor
	for _, d := range manifests {
		name := d.Annotations[ocispec.AnnotationRefName]
		if name != "" && len(tags) < 20 {
			tags = append(tags, fmt.Sprintf("%.60q", name))
		}
		// Some tools write the whole reference where the specification means the tag.
		if tag == "" || name == tag || strings.HasSuffix(name, ":"+tag) || d.Annotations["io.containerd.image.name"] == tag {
			found = append(found, d)
		}
	}
	sort.Strings(tags)
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) == 0:
		return ocispec.Descriptor{}, kind.Errorf(kind.NotFound, "the layout has %s", lacks(tag, tags))
	case tag == "":
		return ocispec.Descriptor{}, kind.Errorf(kind.Invalid, "the layout holds %d images: append :TAG, one of %s", len(found), strings.Join(tags, ", "))
	default:
		return ocispec.Descriptor{}, kind.Errorf(kind.Invalid, "the layout has %d images tagged %.100q", len(found), tag)
	}
}

func (s *fromLayout) String() string           { return s.reference }
func (s *fromLayout) Root() ocispec.Descriptor { return s.root }
func (s *fromLayout) Close() error             { return s.files.Close() }

func (s *fromLayout) Manifest(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
	f, err := s.File(d)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readManifest(io.NewSectionReader(f, 0, registry.MaxManifestBytes+1), d)
}

func (s *fromLayout) File(d ocispec.Descriptor) (spool.File, error) {
	if err := SupportedDigest(d.Digest); err != nil {
		return nil, err
	}
	f, _, err := s.files.open("blobs/" + d.Digest.Algorithm().String() + "/" + d.Digest.Encoded())
	if err != nil {
		return nil, fmt.Errorf("%s lacks blob %s: %w", s.reference, d.Digest, err)
	}
	return f, nil
}

func (s *fromLayout) Blob(_ context.Context, d ocispec.Descriptor, offset int64) (io.ReadCloser, error) {
	f, err := s.File(d)
	if err != nil {
		return nil, err
	}
	return section{io.NewSectionReader(f, offset, 1<<62), f}, nil
}

type section struct {
	io.Reader
	io.Closer
}

func readFile(f files, name string) ([]byte, error) {
	r, size, err := f.open(name)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if size > registry.MaxManifestBytes {
		return nil, kind.Errorf(kind.Invalid, "%s is larger than %d bytes", name, registry.MaxManifestBytes)
	}
	raw, err := readBounded(io.NewSectionReader(r, 0, size), registry.MaxManifestBytes)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return raw, nil
}

// directory is a layout's directory.
type directory string

func (directory) Close() error { return nil }

func (dir directory) open(name string) (spool.File, int64, error) {
	// Nonblocking: a FIFO in the place of a blob must not hold us.
	f, err := os.OpenFile(filepath.Join(string(dir), filepath.FromSlash(name)), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = kind.Errorf(kind.Invalid, "%s is not a regular file", f.Name())
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, info.Size(), nil
}
