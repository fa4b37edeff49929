package imagemgmt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/qcow2"
)

// fileLayers keeps writable layers as qcow2 files. What belongs to one has names that
// begin with the file's.
type fileLayers struct {
	lookup func(ctx context.Context, block Block) error
	open   present.Opener // nil: sizes must be given
}

func (fileLayers) Source(_ string, l Layer) present.Source {
	return present.Source{Kind: present.SourceQcow2, Lvol: l.Block.Name, Target: l.Block.Target, Path: l.Path}
}

func (f fileLayers) Make(ctx context.Context, _ string, l Layer, made bool) error {
	// The layer reads what is below it here.
	if err := f.lookup(ctx, l.Block); err != nil {
		return err
	}
	_, err := os.Lstat(l.Path)
	switch {
	case err == nil:
		return nil
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("look for writable layer: %w", err)
	case made:
		return kind.Errorf(kind.NotFound, "the file %s of the writable layer is gone", l.Path)
	}
	if l.SizeBytes == 0 {
		if l.SizeBytes, err = f.sizeOf(l.Block); err != nil {
			return fmt.Errorf("size of block %s: %w", l.Block.Name, err)
		}
	}
	// Lazy reference counts: one flush less per allocation; qcow2 repairs them after a
	// crash. The file is there whole or not at all.
	err = qcow2.Create(l.Path, qcow2.CreateOptions{SizeBytes: l.SizeBytes, BackingFile: l.Block.Name, BackingFormat: "raw", LazyRefcounts: true})
	if errors.Is(err, kind.Exists) {
		return nil
	}
	return err
}

func (f fileLayers) sizeOf(b Block) (int64, error) {
	if f.open == nil {
		return 0, kind.Errorf(kind.Unsupported, "blocks are not opened here")
	}
	d, err := f.open(b.source(), true)
	if err != nil {
		return 0, err
	}
	return d.SizeBytes(), d.Close()
}

func (fileLayers) Release(context.Context, string, Layer) error { return nil }

func (fileLayers) Delete(_ context.Context, _ string, l Layer) error {
	files, err := layerFiles(l.Path)
	for _, f := range files {
		if rerr := os.Remove(f); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
	}
	if err != nil {
		return fmt.Errorf("delete writable layer: %w", err)
	}
	return nil
}

func (fileLayers) Usage(_ context.Context, _ string, l Layer) (allocatedBytes, files int64, err error) {
	names, err := layerFiles(l.Path)
	for _, name := range names {
		info, err := os.Lstat(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, 0, fmt.Errorf("usage of writable layer: %w", err)
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			allocatedBytes += st.Blocks * 512
			files++
		}
	}
	return allocatedBytes, files, err
}

// layerFiles lists the file of a layer and those beside it.
func layerFiles(path string) (files []string, err error) {
	dir, base := filepath.Split(path)
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		if name := e.Name(); (name == base || strings.HasPrefix(name, base+".")) && !e.IsDir() {
			files = append(files, filepath.Join(dir, name))
		}
	}
	return files, nil
}
