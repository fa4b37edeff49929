package convert

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/image/registry"
	"github.com/thaw-project/thaw/image/source"
	"github.com/thaw-project/thaw/image/spool"
	"github.com/thaw-project/thaw/kind"
)

// destination is where a converted image is stored: a registry or an OCI layout.
// Methods may be called concurrently.
type destination interface {
	// reference names the image there, repository what shares local blocks.
	reference() string
	repository() string

	// check finds out early whether writing is allowed.
	check(ctx context.Context) error

	// blob makes the destination hold d and returns how many bytes that took. Only
	// when d must be sent is open called.
	blob(ctx context.Context, d ocispec.Descriptor, open func(context.Context) (io.ReadCloser, error)) (int64, error)

	// manifest stores a manifest or index, under the image's tag if it is the root.
	manifest(ctx context.Context, d ocispec.Descriptor, raw []byte, root bool) error
}

func openDestination(dest string, client *registry.Client, from source.Source) (destination, error) {
	if rest, ok := strings.CutPrefix(dest, "oci:"); ok {
		dir, tag, _ := strings.Cut(rest, ":")
		if dir == "" || tag == "" {
			return nil, kind.Errorf(kind.Invalid, "destination %.200q is not oci:DIR:TAG", dest)
		}
		return &toLayout{dir: dir, tag: tag, name: dest}, nil
	}
	for _, scheme := range []string{"oci-archive:", "docker-archive:", "http://", "https://"} {
		if strings.HasPrefix(dest, scheme) {
			return nil, kind.Errorf(kind.Invalid, "destination %.200q: must be a registry reference or oci:DIR:TAG", dest)
		}
	}
	ref, err := client.Parse(strings.TrimPrefix(dest, "docker://"))
	if err != nil {
		return nil, err
	}
	tag, ok := ref.(name.Tag)
	if !ok {
		return nil, kind.Errorf(kind.Invalid, "destination %.200q names a digest, which nobody can choose: give a tag", dest)
	}
	pusher, err := client.Pusher(ref.Context())
	if err != nil {
		return nil, err
	}
	d := &toRegistry{tag: tag, pusher: pusher}
	if s, ok := from.(source.Repository); ok {
		repository := s.Repository()
		d.from = &repository
	}
	return d, nil
}

// Reference is the name under which a conversion to dest is recorded. What is no
// destination stays as it is, and is found nowhere.
func Reference(dest string) string {
	if strings.HasPrefix(dest, "oci:") {
		return dest
	}
	ref, err := name.NewTag(strings.TrimPrefix(dest, "docker://"))
	if err != nil {
		return dest
	}
	return ref.Name()
}

type toRegistry struct {
	tag    name.Tag
	pusher *registry.Pusher
	from   *name.Repository
}

func (t *toRegistry) reference() string               { return t.tag.Name() }
func (t *toRegistry) repository() string              { return t.tag.Context().Name() }
func (t *toRegistry) check(ctx context.Context) error { return t.pusher.Check(ctx) }

func (t *toRegistry) blob(ctx context.Context, d ocispec.Descriptor, open func(context.Context) (io.ReadCloser, error)) (int64, error) {
	return t.pusher.Blob(ctx, d, t.from, open)
}

func (t *toRegistry) manifest(ctx context.Context, d ocispec.Descriptor, raw []byte, root bool) error {
	tag := ""
	if root {
		tag = t.tag.TagStr()
	}
	return t.pusher.Manifest(ctx, d.MediaType, raw, tag)
}

// toLayout is an OCI image layout directory. It is made if it is not there.
type toLayout struct{ dir, tag, name string }

func (t *toLayout) reference() string { return t.name }

// repository is the same for all layouts: the same input gives the same manifest
// wherever the directory is.
func (t *toLayout) repository() string { return "oci-layout" }

func (t *toLayout) check(context.Context) error {
	if err := os.MkdirAll(filepath.Join(t.dir, "blobs", "sha256"), 0o755); err != nil {
		return fmt.Errorf("make image layout: %w", err)
	}
	raw, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return err
	}
	return t.write(ocispec.ImageLayoutFile, bytes.NewReader(raw))
}

func (t *toLayout) blobPath(d digest.Digest) string {
	return filepath.Join("blobs", d.Algorithm().String(), d.Encoded())
}

func (t *toLayout) blob(ctx context.Context, d ocispec.Descriptor, open func(context.Context) (io.ReadCloser, error)) (int64, error) {
	path := t.blobPath(d.Digest)
	// Files appear complete, see write.
	if info, err := os.Stat(filepath.Join(t.dir, path)); err == nil {
		if info.Size() == d.Size {
			return 0, nil
		}
		if err := os.Remove(filepath.Join(t.dir, path)); err != nil {
			return 0, fmt.Errorf("replace damaged blob: %w", err)
		}
	}
	r, err := open(ctx)
	if err != nil {
		return 0, err
	}
	defer r.Close()
	return d.Size, t.write(path, r)
}

func (t *toLayout) manifest(ctx context.Context, d ocispec.Descriptor, raw []byte, root bool) error {
	if err := t.write(t.blobPath(d.Digest), bytes.NewReader(raw)); err != nil || !root {
		return err
	}
	// Two conversions into one layout take turns at its index.
	lock, err := os.Open(t.dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", t.dir, err)
	}
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	old, err := os.ReadFile(filepath.Join(t.dir, ocispec.ImageIndexFile))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err == nil {
		if err := json.Unmarshal(old, &index); err != nil {
			return kind.Errorf(kind.Corrupt, "%s in %s: %w", ocispec.ImageIndexFile, t.dir, err)
		}
	}
	kept := index.Manifests[:0]
	for _, m := range index.Manifests {
		if m.Annotations[ocispec.AnnotationRefName] != t.tag {
			kept = append(kept, m)
		}
	}
	d.Annotations = map[string]string{ocispec.AnnotationRefName: t.tag}
	index.Manifests = append(kept, d)
	out, err := json.Marshal(index)
	if err != nil {
		return err
	}
	return t.replace(ocispec.ImageIndexFile, out)
}

// write makes a file appear complete or not at all, and leaves nothing when killed.
// One that is there already has the same bytes, because its name says them.
func (t *toLayout) write(path string, r io.Reader) (err error) {
	full := filepath.Join(t.dir, path)
	defer func() { err = t.explain(full, err) }()
	f, err := spool.Create(filepath.Dir(full))
	if err != nil {
		return err
	}
	defer f.Close()
	if err := fill(f, r); err != nil {
		return err
	}
	err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.AT_FDCWD, full, unix.AT_SYMLINK_FOLLOW)
	switch {
	case errors.Is(err, unix.EEXIST):
		return nil
	case errors.Is(err, unix.ENOENT):
		return kind.Errorf(kind.Unsupported, "this file system cannot make files without a name (O_TMPFILE)")
	}
	return err
}

// replace puts raw in the place of the file at path. The caller has the lock, so
// that what a killed process left of the temporary file is overwritten.
func (t *toLayout) replace(path string, raw []byte) (err error) {
	full := filepath.Join(t.dir, path)
	defer func() { err = t.explain(full, err) }()
	f, err := os.OpenFile(full+".partial", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := fill(f, bytes.NewReader(raw)); err != nil {
		return err
	}
	return os.Rename(f.Name(), full)
}

func fill(f *os.File, r io.Reader) error {
	if _, err := io.Copy(f, r); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	return f.Sync()
}

func (t *toLayout) explain(path string, err error) error {
	if errors.Is(err, unix.ENOSPC) {
		return kind.Errorf(kind.NoSpace, "no space left in image layout %s", t.dir)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}
