package erofs

import "io"

const (
	pageSize = 64 << 10
	// cachedPages bounds the cache to 4 MiB: metadata is read in about the order
	// it was written, so few pages are in use at a time.
	cachedPages = 64
)

// pageCache turns the many small reads of metadata into few larger ones. It is
// not for concurrent use, and only for ranges that nobody writes meanwhile.
type pageCache struct {
	r     io.ReaderAt
	pages map[int64][]byte
	order []int64 // oldest first
}

func newPageCache(r io.ReaderAt) *pageCache {
	return &pageCache{r: r, pages: make(map[int64][]byte)}
}

func (c *pageCache) ReadAt(p []byte, at int64) (int, error) {
	done := 0
	for done < len(p) {
		pos := at + int64(done)
		page, err := c.page(pos / pageSize)
		if err != nil {
			return done, err
		}
		in := int(pos % pageSize)
		if in >= len(page) {
			return done, io.EOF
		}
		done += copy(p[done:], page[in:])
	}
	return done, nil
}

func (c *pageCache) page(i int64) ([]byte, error) {
	if p, ok := c.pages[i]; ok {
		return p, nil
	}
	var p []byte
	if len(c.order) == cachedPages {
		old := c.order[0]
		c.order = append(c.order[:0], c.order[1:]...)
		p = c.pages[old][:pageSize]
		delete(c.pages, old)
	} else {
		p = make([]byte, pageSize)
	}
	n, err := c.r.ReadAt(p, i*pageSize)
	if err != nil && err != io.EOF {
		return nil, err
	}
	c.pages[i] = p[:n]
	c.order = append(c.order, i)
	return p[:n], nil
}
