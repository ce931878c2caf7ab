// Byte-pair encoding for megatron_ext/data/fast_tokenizer.py: texts to token ids, equal to the `tokenizers` library's.
//
// How: a section of text (what lies between added tokens) is cut into words at places that no merge can cross, each
// word is looked up in a bounded cache of words already encoded, and only a word not found there is merged. Three
// styles of tokenizer are known:
//
//   metaspace   SentencePiece-like. A merge joins the last character of its left part to the first of its right
//               part; a pair of neighbouring characters that no merge joins so is never crossed. Spaces count as
//               U+2581; they stay spaces in the text and in the cache's keys. Characters outside the vocabulary
//               become one token per byte.
//   own words   The same, in words as well: the matches of the expression of tools/build_tokenizer.py, with _ for
//               U+2581:  _?[\p{L}\p{M}]+|\p{N}|_?[^_\p{L}\p{M}\p{N}\x00-\x1F]+|_+(?=_[^_\p{N}])|_+
//   byte level  GPT-2-like. Words are the matches of GPT-2's regular expression
//               's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//               and the symbols are bytes.
//
// Word starts are found in blocks of 64 bytes, as a 64-bit mask, by one table of ASCII byte pairs, or, for byte level on
// x86-64, from masks of classes that 16 bytes at a time give; only blocks that hold other bytes are decoded. All words
// of a block are asked of the cache before the first is used, so that its misses in the processor's caches overlap. C
// ABI, no Python headers, little-endian processors of 64 bits; texts must be valid UTF-8. A handle is for one thread at
// a time.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <queue>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __SSE2__  // all of x86-64 has it
#include <emmintrin.h>
#endif

namespace {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i64 = std::int64_t;

constexpr u32 kNone = 0xFFFFFFFFu;
constexpr u32 kMetaspaceChar = 0x2581;
constexpr i64 kBlock = 64;

inline bool likely(bool value) { return __builtin_expect(value, 1); }
inline bool unlikely(bool value) { return __builtin_expect(value, 0); }

inline u64 load64(const u8* p) {
  u64 value;
  std::memcpy(&value, p, 8);
  return value;
}

inline u32 load16(const u8* p) { return p[0] | static_cast<u32>(p[1]) << 8; }

// Mix two words into one whose bits all depend on both.
inline u64 mix(u64 a, u64 b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<u64>(product) ^ static_cast<u64>(product >> 64);
}

constexpr u64 kSeed1 = 0x9E3779B97F4A7C15ull, kSeed2 = 0xC2B2AE3D27D4EB4Full, kSeed3 = 0xD6E8FEB86659FD93ull;

inline bool is_continuation(u8 byte) { return (byte & 0xC0) == 0x80; }

inline int char_length(u8 lead) { return lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4; }

inline u32 decode(const u8* p) {
  const u8 lead = p[0];
  if (lead < 0x80) return lead;
  if (lead < 0xE0) return (lead & 0x1Fu) << 6 | (p[1] & 0x3Fu);
  if (lead < 0xF0) return (lead & 0x0Fu) << 12 | (p[1] & 0x3Fu) << 6 | (p[2] & 0x3Fu);
  return (lead & 0x07u) << 18 | (p[1] & 0x3Fu) << 12 | (p[2] & 0x3Fu) << 6 | (p[3] & 0x3Fu);
}

inline const u8* previous_char(const u8* p) {
  do --p;
  while (is_continuation(*p));
  return p;
}

enum Style { kMetaspace = 0, kByteLevel = 1, kOwnWords = 2 };
enum Prefix { kNever = 0, kFirst = 1, kAlways = 2, kEven = 3 };
enum CharClass : u8 { kOther = 0, kLetter = 1, kNumber = 2, kSpace = 3, kControl = 4 };

}  // namespace

extern "C" {

// What Python passes; all pointers are read during mp_create only.
struct MpConfig {
  std::int32_t style;
  std::int32_t prefix;    // kEven: also before a text that begins with a space
  std::int32_t id_bytes;  // 2 or 4
  std::int32_t reserved;
  i64 num_merges;         // in order of rank
  const u32* merge_left;
  const u32* merge_right;
  const u32* merge_result;
  const u32* byte_ids;    // [256]
  i64 num_chars;          // metaspace: characters of the vocabulary
  const u32* chars;
  const u32* char_ids;
  i64 num_pairs;          // metaspace: neighbouring characters that some merge joins
  const u32* pair_left;
  const u32* pair_right;
  i64 num_ranges;         // byte level and own words: classes of characters, [first, last]
  const u32* range_first;
  const u32* range_last;
  const u8* range_class;
  i64 num_added;          // added tokens, one after another
  const u8* added_bytes;
  const i64* added_ends;
  const u32* added_ids;
  const u8* added_late;    // matched in what the others leave over
  const u8* added_hidden;  // matched, and then treated as text
};

}  // extern "C"

namespace {

// Zeroed memory for tables that are read at random; in large pages where the system gives them.
template <class T>
class Table {
 public:
  explicit Table(u64 count) {
    const u64 bytes = (count * sizeof(T) + kPage - 1) / kPage * kPage;
    data_ = static_cast<T*>(std::aligned_alloc(kPage, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
#ifdef __linux__
    madvise(data_, bytes, MADV_HUGEPAGE);
#endif
    std::memset(static_cast<void*>(data_), 0, count * sizeof(T));
  }
  ~Table() { std::free(data_); }
  Table(const Table&) = delete;
  Table& operator=(const Table&) = delete;

  T* get() const { return data_; }

 private:
  static constexpr u64 kPage = 2 << 20;
  T* data_;
};

constexpr u32 kNoRank = 0xFFFFFF;

// Ranks of pairs of symbols, by open addressing. A slot holds left (20 bits), right (20 bits) and rank (24 bits). Most
// pairs asked for have none: the filter, small enough for the L2 cache, knows most of those.
class MergeTable {
 public:
  explicit MergeTable(const MpConfig& config)
      : slots_(num_slots(config)), results_(config.merge_result, config.merge_result + config.num_merges) {
    const u64 size = num_slots(config);
    std::memset(slots_.get(), 0xFF, size * sizeof(u64));
    shift_ = 64 - __builtin_ctzll(size);
    mask_ = size - 1;
    for (i64 rank = 0; rank < config.num_merges; ++rank) {
      const u64 pair = static_cast<u64>(config.merge_left[rank]) << 20 | config.merge_right[rank];
      u64 at = first_slot(pair);
      while (slots_.get()[at] != ~0ull) at = (at + 1) & mask_;
      slots_.get()[at] = pair << 24 | static_cast<u64>(rank);
      const u64 bit = filter_bit(pair);
      filter_[bit >> 6] |= 1ull << (bit & 63);
    }
  }

  u32 rank(u32 left, u32 right) const {
    const u64 pair = static_cast<u64>(left) << 20 | right;
    const u64 bit = filter_bit(pair);
    if (!(filter_[bit >> 6] >> (bit & 63) & 1)) return kNoRank;
    for (u64 at = first_slot(pair);; at = (at + 1) & mask_) {
      const u64 slot = slots_.get()[at];
      if (slot >> 24 == pair || slot == ~0ull) return slot & kNoRank;
    }
  }

  u32 result(u32 rank) const { return results_[rank]; }

 private:
  static u64 num_slots(const MpConfig& config) {
    u64 size = 64;
    while (size < 2 * static_cast<u64>(config.num_merges)) size *= 2;
    return size;
  }

  u64 first_slot(u64 pair) const { return pair * kSeed1 >> shift_; }

  static u64 filter_bit(u64 pair) { return pair * kSeed2 >> (64 - kFilterBits); }

  static constexpr int kFilterBits = 20;

  u64 filter_[(1 << kFilterBits) / 64] = {};
  Table<u64> slots_;
  std::vector<u32> results_;
  int shift_;
  u64 mask_;
};

// Sparse map from code points to values: pages of 256.
template <class Value>
class CharMap {
 public:
  explicit CharMap(Value absent) : pages_(0x110000 >> 8, 0), values_(256, absent), absent_(absent) {}

  Value get(u32 c) const { return values_[static_cast<u64>(pages_[c >> 8]) << 8 | (c & 0xFF)]; }

  void set(u32 c, Value value) {
    u16& page = pages_[c >> 8];
    if (page == 0) {
      page = static_cast<u16>(values_.size() >> 8);
      values_.resize(values_.size() + 256, absent_);
    }
    values_[static_cast<u64>(page) << 8 | (c & 0xFF)] = value;
  }

 private:
  std::vector<u16> pages_;
  std::vector<Value> values_;
  Value absent_;
};

// Added tokens of one kind, matched leftmost-longest by a trie.
class AddedTokens {
 public:
  struct Match {
    i64 start, end;  // start == end: none
    u32 id;
    bool hidden;
  };

  void add(const u8* bytes, i64 size, u32 id, bool hidden) {
    if (nodes_.empty()) nodes_.emplace_back();
    u32 node = 0;
    for (i64 i = 0; i < size; ++i) {
      u32 next = child(node, bytes[i]);
      if (next == 0) {
        next = static_cast<u32>(nodes_.size());
        nodes_.emplace_back();
        nodes_[node].children.push_back({bytes[i], next});
      }
      node = next;
    }
    nodes_[node].id = id;
    nodes_[node].hidden = hidden;
    if (!leads_[bytes[0]]) ++num_leads_;
    leads_[bytes[0]] = true;
    only_lead_ = bytes[0];
    for (u32 second = 0; second < 256; ++second)
      if (size == 1 || bytes[1] == second) pairs_[bytes[0] | second << 8] = 1;
  }

  bool empty() const { return nodes_.empty(); }

  // First match in [from, end). One byte past `end` must be readable.
  Match find(const u8* text, i64 from, i64 end) const {
    for (i64 at = from;; ++at) {
      if (num_leads_ == 1) {
        const void* found = at < end ? std::memchr(text + at, only_lead_, end - at) : nullptr;
        if (found == nullptr) break;
        at = static_cast<const u8*>(found) - text;
      } else {
        for (const u8* p = text + at; at < end; at += 4, p += 4)
          if (pairs_[load16(p)] | pairs_[load16(p + 1)] | pairs_[load16(p + 2)] | pairs_[load16(p + 3)]) break;
        while (at < end && !pairs_[load16(text + at)]) ++at;
        if (at >= end) break;
      }
      Match match{end, end, 0, false};
      u32 node = 0;
      for (i64 i = at; i < end && (node = child(node, text[i])) != 0; ++i)
        if (nodes_[node].id != kNone) match = {at, i + 1, nodes_[node].id, nodes_[node].hidden};
      if (match.start < match.end) return match;
    }
    return {end, end, 0, false};
  }

 private:
  struct Child {
    u8 byte;
    u32 node;
  };
  struct Node {
    u32 id = kNone;
    bool hidden = false;
    std::vector<Child> children;
  };

  // 0, the root, is nobody's child.
  u32 child(u32 node, u8 byte) const {
    for (const Child& child : nodes_[node].children)
      if (child.byte == byte) return child.node;
    return 0;
  }

  std::vector<Node> nodes_;
  bool leads_[256] = {};
  u8 pairs_[65536] = {};  // by first two bytes
  int num_leads_ = 0;
  u8 only_lead_ = 0;
};

// What a pair of neighbouring ASCII bytes says about word starts.
constexpr u8 kStartsHere = 1, kStartsBefore = 2, kContraction = 4;

#ifdef __SSE2__

// The bytes of a block that are of a class, as masks; ASCII, with the usual classes.
struct AsciiClasses {
  u64 letters = 0, numbers = 0, spaces = 0, plain_spaces = 0, quotes = 0;

  explicit AsciiClasses(const u8* p) {
    for (int base = 0; base < kBlock; base += 16) {
      const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + base));
      const __m128i plain = _mm_cmpeq_epi8(c, _mm_set1_epi8(' '));
      letters |= bits(within(_mm_or_si128(c, plain_bit()), 'a', 26)) << base;
      numbers |= bits(within(c, '0', 10)) << base;
      spaces |= bits(_mm_or_si128(plain, within(c, '\t', 5))) << base;
      plain_spaces |= bits(plain) << base;
      quotes |= bits(_mm_cmpeq_epi8(c, _mm_set1_epi8('\''))) << base;
    }
  }

  static CharClass of(u32 c) {
    return (c | 0x20) - 'a' < 26 ? kLetter : c - '0' < 10 ? kNumber : c == ' ' || c - '\t' < 5 ? kSpace : kOther;
  }

 private:
  static __m128i plain_bit() { return _mm_set1_epi8(0x20); }

  // The comparison is of signed numbers: the range is moved down to where these begin.
  static __m128i within(__m128i c, int first, int count) {
    return _mm_cmplt_epi8(_mm_sub_epi8(c, _mm_set1_epi8(static_cast<char>(first + 128))),
                          _mm_set1_epi8(static_cast<char>(count - 128)));
  }

  static u64 bits(__m128i bytes) { return static_cast<u32>(_mm_movemask_epi8(bytes)); }
};

#endif

// Finds words. `starts` gives a mask over 64 bytes.
class Words {
 public:
  explicit Words(const MpConfig& config) : style_(static_cast<Style>(config.style)), classes_(kOther) {
    for (i64 i = 0; i < config.num_ranges; ++i)
      for (u32 c = config.range_first[i]; c <= config.range_last[i]; ++c) classes_.set(c, config.range_class[i]);
    if (style_ == kOwnWords) {
      for (u32 c = 0; c < 0x20; ++c) classes_.set(c, kControl);
      classes_.set(' ', kSpace);
      classes_.set(kMetaspaceChar, kSpace);
    }
#ifdef __SSE2__
    usual_ = style_ == kByteLevel;
    for (u32 c = 0; c < 128; ++c) usual_ = usual_ && classes_.get(c) == AsciiClasses::of(c);
#endif
    joined_.assign(kJoinedBits / 64, 0);
    std::vector<u8> ascii(128 * 128, 0);
    for (i64 i = 0; i < config.num_pairs; ++i) {
      const u32 left = config.pair_left[i], right = config.pair_right[i];
      const u32 bit = joined_bit(left, right);
      joined_[bit >> 6] |= 1ull << (bit & 63);
      const u32 a = left == kMetaspaceChar ? ' ' : left, b = right == kMetaspaceChar ? ' ' : right;
      // A space of a piece is never a space of the text: those are U+2581 by then.
      if (left != ' ' && right != ' ' && a < 128 && b < 128) ascii[a << 7 | b] = 1;
    }
    for (u32 a = 0; a < 128; ++a)
      for (u32 b = 0; b < 128; ++b) {
        u8 pair = style_ == kMetaspace ? 0 : class_pair(classes_.get(a), classes_.get(b), a == ' ');
        if (style_ == kByteLevel && a == '\'' && std::strchr("stmdrvl", static_cast<int>(b)) && b) pair |= kContraction;
        if (style_ != kByteLevel && !ascii[a << 7 | b]) pair |= kStartsHere;
        pairs_[a | b << 8] = pair;
      }
  }

  // Word starts among [block, block + 64) of a section of n bytes; bit 0 is not set for the section's own start.
  u64 starts(const u8* text, i64 block, i64 n) {
    const i64 left = n - block;
    if (unlikely(has_high_bytes(text + block, text[block > 0 ? block - 1 : 0])))
      return style_ == kByteLevel ? contractions(decoded(text, block, n), text, block, n) : decoded(text, block, n);
    u64 before = 0, quotes = 0;
    const u8* p = text + block;
#ifdef __SSE2__
    if (usual_) {
      u64 here = usual_starts(p, block > 0 ? p[-1] : 0, left, &quotes);
      if (block == 0) here |= 1;
      if (unlikely(quotes | carried_ | carried_off_)) here = contractions(here, text, block, n);
      return block == 0 ? here & ~1ull : here;
    }
#endif
    u64 here = pairs_[(block > 0 ? p[-1] : 0) | p[0] << 8] & kStartsHere;
    if (style_ != kMetaspace) {
      for (int base = 0; base < kBlock && base < left; base += 16)
#pragma GCC unroll 16
        for (int k = base; k < base + 16; ++k) {
          const u64 pair = pairs_[load16(p + k) & 0x7FFF];
          here |= (pair & 1) << 1 << k;
          before |= (pair >> 1 & 1) << k;
          quotes |= pair >> 2;
        }
      if (left <= kBlock) before &= (1ull << (left - 1)) - 1;
      here |= before;
    } else {
      for (int base = 0; base < kBlock && base < left; base += 16)
#pragma GCC unroll 16
        for (int k = base; k < base + 16; ++k) here |= static_cast<u64>(pairs_[load16(p + k) & 0x7FFF]) << 1 << k;
    }
    if (left < kBlock) here &= (1ull << left) - 1;
    if (block == 0) here |= 1;
    if (unlikely(quotes | carried_ | carried_off_)) here = contractions(here, text, block, n);
    return block == 0 ? here & ~1ull : here;
  }

  void reset() { carried_ = 0; carried_off_ = 0; }

 private:
  static constexpr u32 kJoinedBits = 1 << 17;

  static u32 joined_bit(u32 left, u32 right) {
    return static_cast<u32>((left * 0x9E3779B1u ^ right * 0x85EBCA77u) * 0xC2B2AE3Du) >> 15;
  }

  // What two neighbouring classes say; a word takes the one space before it along.
  u8 class_pair(u8 first, u8 second, bool first_is_plain_space) const {
    const bool taken_along = style_ == kOwnWords ? first == kSpace : first_is_plain_space;
    const bool number_alone = style_ == kOwnWords && second == kNumber;
    u8 pair = 0;
    if (second == kSpace || second == kControl ? first != second : number_alone || (first != second && !taken_along))
      pair |= kStartsHere;
    // The last of several spaces is a word's; but where the text ends, and before a number that stands alone.
    if (first == kSpace && second != kSpace && !number_alone) pair |= kStartsBefore;
    return pair;
  }

  // Whether the byte before a block, the block, or the byte after it is outside ASCII.
  static bool has_high_bytes(const u8* p, u8 before) {
    u64 any = before | p[kBlock];
    for (int k = 0; k < kBlock; k += 8) any |= load64(p + k);
    return (any & 0x8080808080808080ull) != 0;
  }

#ifdef __SSE2__
  // The same for byte level in ASCII, from masks of classes instead of pairs.
  static u64 usual_starts(const u8* p, u8 previous, i64 left, u64* quotes) {
    const AsciiClasses here(p);
    const CharClass last = AsciiClasses::of(previous), next = AsciiClasses::of(p[kBlock]);
    const u64 spaces_before = here.spaces << 1 | (last == kSpace);
    const u64 letters_before = here.letters << 1 | (last == kLetter);
    const u64 numbers_before = here.numbers << 1 | (last == kNumber);
    const u64 plain_before = here.plain_spaces << 1 | (previous == ' ');
    const u64 others = ~(here.letters | here.numbers | here.spaces);
    const u64 others_before = ~(letters_before | numbers_before | spaces_before);
    const u64 changes = (here.letters & ~letters_before) | (here.numbers & ~numbers_before) | (others & ~others_before);
    u64 last_spaces = here.spaces & ~(here.spaces >> 1 | static_cast<u64>(next == kSpace) << 63);
    if (left <= kBlock) last_spaces &= (1ull << (left - 1)) - 1;
    *quotes = here.quotes & (here.letters >> 1 | static_cast<u64>(next == kLetter) << 63);
    const u64 starts = (here.spaces & ~spaces_before) | (changes & ~plain_before) | last_spaces;
    return left < kBlock ? starts & ((1ull << left) - 1) : starts;
  }
#endif

  u64 decoded(const u8* text, i64 block, i64 n) const {
    const i64 end = std::min(block + kBlock, n);
    i64 at = block;
    while (at < end && is_continuation(text[at])) ++at;
    if (at == end) return 0;
    u64 mask = 0;
    u32 previous = at > 0 ? decode(previous_char(text + at)) : 0;
    while (at < end) {
      const u32 current = decode(text + at);
      const i64 next = at + char_length(text[at]);
      bool start = style_ != kByteLevel && !joined(previous, current);
      if (style_ != kMetaspace) {
        const u8 kind = classes_.get(current);
        start |= class_pair(classes_.get(previous), kind, previous == ' ') & kStartsHere;
        if (kind == kSpace && next < n)
          start |= (class_pair(kind, classes_.get(decode(text + next)), current == ' ') & kStartsBefore) != 0;
      }
      // The section's start is told to `contractions`; `starts` promises to leave it out.
      if (at == 0 ? style_ == kByteLevel : start) mask |= 1ull << (at - block);
      previous = current;
      at = next;
    }
    return mask;
  }

  bool joined(u32 left, u32 right) const {
    const u32 bit = joined_bit(left == ' ' ? kMetaspaceChar : left, right == ' ' ? kMetaspaceChar : right);
    return joined_[bit >> 6] >> (bit & 63) & 1;
  }

  // Cut 's 't 'm 'd 're 've 'll off where the apostrophe begins a word: the letter after it begins none, and what
  // follows does. Bits for the next block are carried.
  u64 contractions(u64 mask, const u8* text, i64 block, i64 n) {
    mask = (mask | carried_) & ~carried_off_;
    carried_ = carried_off_ = 0;
    for (u64 rest = mask; rest != 0;) {
      const int k = __builtin_ctzll(rest);
      rest &= rest - 1;
      const i64 at = block + k;
      if (text[at] != '\'') continue;
      const int size = contraction_length(text + at, n - at);
      if (size == 0) continue;
      clear(mask, k + 1);
      if (at + size < n) set(mask, k + size);
    }
    return block == 0 ? mask & ~1ull : mask;
  }

  static int contraction_length(const u8* p, i64 left) {
    if (left < 2) return 0;
    const u8 a = p[1];
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    if (left < 3) return 0;
    const u8 b = p[2];
    return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
  }

  void clear(u64& mask, int k) {
    if (k < kBlock)
      mask &= ~(1ull << k);
    else
      carried_off_ |= 1ull << (k - kBlock);
  }

  void set(u64& mask, int k) {
    if (k < kBlock)
      mask |= 1ull << k;
    else
      carried_ |= 1ull << (k - kBlock);
  }

  Style style_;
  bool usual_ = false;  // byte level, and ASCII's classes are what AsciiClasses takes them for
  CharMap<u8> classes_;
  std::vector<u64> joined_;
  u8 pairs_[1 << 15] = {};
  u64 carried_ = 0, carried_off_ = 0;
};

// Merging of one word's symbols.
class Merger {
 public:
  explicit Merger(const MpConfig& config)
      : merges_(config), byte_level_(config.style == kByteLevel), char_ids_(kNone) {
    std::copy(config.byte_ids, config.byte_ids + 256, byte_ids_);
    for (i64 i = 0; i < config.num_chars; ++i) char_ids_.set(config.chars[i], config.char_ids[i]);
    // A literal space never comes here: the texts' spaces are U+2581.
    for (u32 c = 0; c < 128; ++c) {
      const u32 id = char_ids_.get(c == ' ' ? kMetaspaceChar : c);
      ascii_ids_[c] = byte_level_ || id == kNone ? byte_ids_[c] : id;
    }
    for (u32 a = 0; a < 128; ++a)
      for (u32 b = 0; b < 128; ++b) ascii_ranks_[a << 7 | b] = merges_.rank(ascii_ids_[a], ascii_ids_[b]);
  }

  // Encode a word; the ids lie in `ids()` until the next call.
  i64 encode(const u8* word, i64 size) {
    if (static_cast<i64>(symbols_.size()) < size) symbols_.resize(size);
    u32* ids = symbols_.data();
    i64 count = 0;
    if (byte_level_) {
      for (i64 i = 0; i < size; ++i) ids[i] = byte_ids_[word[i]];
      count = size;
    } else {
      for (i64 i = 0; i < size;) {
        if (word[i] < 128) {
          ids[count++] = ascii_ids_[word[i++]];
          continue;
        }
        const int length = char_length(word[i]);
        const u32 id = char_ids_.get(decode(word + i));
        if (id != kNone)
          ids[count++] = id;
        else
          for (int k = 0; k < length; ++k) ids[count++] = byte_ids_[word[i + k]];
        i += length;
      }
    }
    if (count > kSmall) return merge_large(ids, count);
    u32 ranks[kSmall];
    if (count == size && is_ascii(word, size))
      for (i64 i = 0; i + 1 < count; ++i) ranks[i] = ascii_ranks_[word[i] << 7 | word[i + 1]];
    else
      for (i64 i = 0; i + 1 < count; ++i) ranks[i] = merges_.rank(ids[i], ids[i + 1]);
    return merge_small(ids, ranks, static_cast<int>(count));
  }

  const u32* ids() const { return symbols_.data(); }

 private:
  static constexpr int kSmall = 64;

  static bool is_ascii(const u8* p, i64 size) {
    u8 any = 0;
    for (i64 i = 0; i < size; ++i) any |= p[i];
    return any < 128;
  }

  // Lowest rank first, leftmost among equals. Symbols stay where they are and are linked; `keys` holds rank and place
  // of each one's pair with the next, in whole groups of 8 so that the search for the lowest has few branches.
  int merge_small(u32* ids, const u32* ranks, int count) const {
    u32 keys[kSmall];
    u8 before[kSmall + 1], after[kSmall + 1];
    const int lanes = (count + 7) & ~7;
    for (int i = 0; i < lanes; ++i) keys[i] = ~0u;
    for (int i = 0; i < count; ++i) {
      before[i] = static_cast<u8>(i - 1);
      after[i] = static_cast<u8>(i + 1);
    }
    for (int i = 0; i + 1 < count; ++i) keys[i] = ranks[i] << 8 | i;
    while (true) {
      u32 best = ~0u;
      for (int i = 0; i < lanes; i += 8)
        for (int k = 0; k < 8; ++k) best = keys[i + k] < best ? keys[i + k] : best;
      if (best >= kNoRank << 8) break;
      const int at = best & 0xFF, gone = after[at], next = after[gone];
      ids[at] = merges_.result(best >> 8);
      after[at] = static_cast<u8>(next);
      before[next] = static_cast<u8>(at);
      keys[gone] = ~0u;
      keys[at] = next < count ? key(ids, at, next) : ~0u;
      if (at > 0) keys[before[at]] = key(ids, before[at], at);
    }
    int kept = 0;
    for (int at = 0; at < count; at = after[at]) ids[kept++] = ids[at];
    return kept;
  }

  u32 key(const u32* ids, int at, int next) const { return merges_.rank(ids[at], ids[next]) << 8 | at; }

  // The same with a heap: O(n log n) whatever the word.
  i64 merge_large(u32* ids, i64 count) {
    struct Candidate {
      u32 rank, at;
      bool operator<(const Candidate& other) const { return rank != other.rank ? rank > other.rank : at > other.at; }
    };
    if (count >= static_cast<i64>(kNone)) throw std::bad_alloc();
    const u32 size = static_cast<u32>(count);
    std::vector<u32> before(size), after(size), ranks(size, kNoRank);
    std::vector<Candidate> first;
    const auto look = [&](u32 at) {
      ranks[at] = merges_.rank(ids[at], ids[after[at]]);
      return ranks[at] != kNoRank;
    };
    for (u32 i = 0; i < size; ++i) {
      before[i] = i - 1;
      after[i] = i + 1;
      if (i + 1 < size && look(i)) first.push_back({ranks[i], i});
    }
    std::priority_queue<Candidate> queue(std::less<Candidate>(), std::move(first));
    while (!queue.empty()) {
      const Candidate top = queue.top();
      queue.pop();
      if (ranks[top.at] != top.rank) continue;  // one of the two has been merged away since
      const u32 gone = after[top.at];
      ids[top.at] = merges_.result(top.rank);
      after[top.at] = after[gone];
      ranks[top.at] = ranks[gone] = kNoRank;
      if (after[gone] < size) before[after[gone]] = top.at;
      if (after[top.at] < size && look(top.at)) queue.push({ranks[top.at], top.at});
      if (top.at > 0 && look(before[top.at])) queue.push({ranks[before[top.at]], before[top.at]});
    }
    i64 kept = 0;
    for (u32 at = 0; at < size; at = after[at]) ids[kept++] = ids[at];
    return kept;
  }

  MergeTable merges_;
  bool byte_level_;
  u32 byte_ids_[256], ascii_ids_[128], ascii_ranks_[128 * 128];
  CharMap<u32> char_ids_;
  std::vector<u32> symbols_;
};

struct Encoder {
  virtual ~Encoder() = default;
  virtual i64 encode(const u8* text, const i64* starts, const i64* ends, i64 num_texts, std::int32_t* lengths) = 0;
  virtual const void* ids() const = 0;
};

// A word of up to 15 bytes with few ids: half a cache line.
template <class Id>
struct alignas(32) ShortEntry {
  u64 low, high;  // the word's bytes, and its size in the highest byte
  Id ids[14 / sizeof(Id)];
  u16 count;
};

// A longer word.
template <class Id>
struct alignas(64) LongEntry {
  static constexpr i64 kKeyBytes = 64;
  u8 key[kKeyBytes];
  u8 size, count;
  Id ids[62 / sizeof(Id)];
};

template <class Id>
class EncoderOf final : public Encoder {
 public:
  explicit EncoderOf(const MpConfig& config)
      : prefix_(static_cast<Prefix>(config.prefix)),
        metaspace_(config.style != kByteLevel),
        words_(config),
        merger_(config),
        short_(2 * kShortSets),
        long_(kLongSlots) {
    for (i64 i = 0, start = 0; i < config.num_added; start = config.added_ends[i], ++i)
      (config.added_late[i] ? late_ : early_)
          .add(config.added_bytes + start, config.added_ends[i] - start, config.added_ids[i], config.added_hidden[i]);
    for (int size = 0; size <= 15; ++size) {
      low_mask_[size] = size >= 8 ? ~0ull : (1ull << (8 * size)) - 1;
      high_mask_[size] = size <= 8 ? 0 : (1ull << (8 * (size - 8))) - 1;
    }
  }

  i64 encode(const u8* text, const i64* starts, const i64* ends, i64 num_texts, std::int32_t* lengths) override {
    used_ = 0;
    for (i64 i = 0; i < num_texts; ++i) {
      const i64 before = used_;
      split_early(text, starts[i], ends[i]);
      if (used_ - before > INT32_MAX) return -2 - i;
      lengths[i] = static_cast<std::int32_t>(used_ - before);
    }
    return used_;
  }

  const void* ids() const override { return out_.get(); }

 private:
  // 16 and 8 MiB: what a corpus repeats fits, and memory stays flat whatever the corpus.
  static constexpr u64 kShortSets = 1 << 18, kLongSlots = 1 << 16;

  void split_early(const u8* text, i64 start, i64 end) {
    if (early_.empty()) return split_late(text, start, start, end);
    split(early_, text, start, end, [&](i64 a, i64 b) { split_late(text, start, a, b); });
  }

  void split_late(const u8* text, i64 origin, i64 start, i64 end) {
    if (late_.empty()) return section(text, origin, start, end);
    split(late_, text, start, end, [&](i64 a, i64 b) { section(text, origin, a, b); });
  }

  template <class Piece>
  void split(const AddedTokens& added, const u8* text, i64 start, i64 end, Piece piece) {
    for (i64 at = start; at < end;) {
      const AddedTokens::Match match = added.find(text, at, end);
      at = match.end;
      if (match.start == match.end) break;
      if (match.hidden) continue;
      if (start < match.start) piece(start, match.start);
      reserve(1);
      out_[used_++] = static_cast<Id>(match.id);
      start = match.end;
    }
    if (start < end) piece(start, end);
  }

  // Encode the text between two added tokens; `origin` is the text's start, which a space precedes.
  void section(const u8* text, i64 origin, i64 start, i64 end) {
    if (start == end) return;
    const bool spaced = text[start] == ' ' || (metaspace_ && std::memcmp(text + start, "\xE2\x96\x81", 3) == 0);
    const bool wanted =
        prefix_ == kEven || (prefix_ != kNever && !spaced && (prefix_ == kAlways || start == origin));
    if (!wanted) return words(text + start, end - start);
    if (start == origin) return words(text + start - 1, end - start + 1);
    scratch_.resize(end - start + 1 + 2 * kBlock);
    scratch_[0] = ' ';
    std::memcpy(scratch_.data() + 1, text + start, end - start);
    words(scratch_.data(), end - start + 1);
  }

  void words(const u8* p, i64 n) {
    reserve(n);
    words_.reset();
    Id* out = out_.get() + used_;
    i64 word = 0;
    Lookup lookups[kBlock + 1];
    for (i64 block = 0; block < n; block += kBlock) {
      Lookup* last = lookups;
      for (u64 mask = words_.starts(p, block, n); mask != 0; mask &= mask - 1) {
        const i64 at = block + __builtin_ctzll(mask);
        prepare(last++, p + word, at - word);
        word = at;
      }
      if (block + kBlock >= n) prepare(last++, p + word, n - word);
      for (const Lookup* lookup = lookups; lookup < last; ++lookup) out = emit(out, *lookup);
    }
    used_ = out - out_.get();
  }

  // A word on its way through the cache; all of a block are asked for before the first is used.
  struct Lookup {
    const u8* word;
    i64 size;
    u64 low, high;
    ShortEntry<Id>* set;
  };

  void prepare(Lookup* lookup, const u8* word, i64 size) {
    lookup->word = word;
    lookup->size = size;
    const i64 shown = size & 15;
    const u64 low = load64(word) & low_mask_[shown];
    const u64 high = (load64(word + 8) & high_mask_[shown]) | static_cast<u64>(shown) << 56;
    lookup->low = low;
    lookup->high = high;
    lookup->set = short_.get() + 2 * (mix(low ^ kSeed1, high ^ kSeed2) & (kShortSets - 1));
    __builtin_prefetch(lookup->set);
  }

  Id* emit(Id* out, const Lookup& lookup) {
    if (unlikely(lookup.size > 15)) return emit_long(out, lookup.word, lookup.size);
    ShortEntry<Id>* set = lookup.set;
    const u64 not_first = (set[0].low ^ lookup.low) | (set[0].high ^ lookup.high);
    const u64 not_second = (set[1].low ^ lookup.low) | (set[1].high ^ lookup.high);
    const u64 second = not_first != 0;
    if (unlikely(second & (not_second != 0))) return miss(out, lookup.word, lookup.size, lookup.low, lookup.high, set);
    const ShortEntry<Id>& entry = set[second];
    std::memcpy(out, entry.ids, 14 / sizeof(Id) * sizeof(Id));
    return out + entry.count;
  }

  __attribute__((noinline)) Id* miss(Id* out, const u8* word, i64 size, u64 low, u64 high, ShortEntry<Id>* set) {
    const i64 count = merger_.encode(word, size);
    const u32* ids = merger_.ids();
    for (i64 i = 0; i < count; ++i) out[i] = static_cast<Id>(ids[i]);
    if (count > static_cast<i64>(14 / sizeof(Id))) return out + count;
    set[1] = set[0];
    set[0].low = low;
    set[0].high = high;
    set[0].count = static_cast<u16>(count);
    for (i64 i = 0; i < count; ++i) set[0].ids[i] = out[i];
    return out + count;
  }

  __attribute__((noinline)) Id* emit_long(Id* out, const u8* word, i64 size) {
    const bool fits = size <= LongEntry<Id>::kKeyBytes;
    LongEntry<Id>* entry = nullptr;
    if (fits) {
      u64 hash = kSeed3 ^ size;
      for (i64 i = 0; i + 8 < size; i += 8) hash = mix(hash ^ load64(word + i), kSeed1);
      hash = mix(hash ^ load64(word + size - 8), kSeed2);
      entry = long_.get() + (hash & (kLongSlots - 1));
      if (entry->size == size && std::memcmp(entry->key, word, size) == 0) {
        for (int i = 0; i < entry->count; ++i) out[i] = entry->ids[i];
        return out + entry->count;
      }
    }
    const i64 count = merger_.encode(word, size);
    const u32* ids = merger_.ids();
    for (i64 i = 0; i < count; ++i) out[i] = static_cast<Id>(ids[i]);
    if (fits && count <= static_cast<i64>(62 / sizeof(Id))) {
      std::memcpy(entry->key, word, size);
      entry->size = static_cast<u8>(size);
      entry->count = static_cast<u8>(count);
      for (i64 i = 0; i < count; ++i) entry->ids[i] = out[i];
    }
    return out + count;
  }

  // Make room for `count` more ids, and 16 that a copy may write past them.
  void reserve(i64 count) {
    const i64 needed = used_ + count + 16;
    if (likely(needed <= capacity_)) return;
    const i64 larger = std::max(needed, capacity_ + capacity_ / 2);
    std::unique_ptr<Id[]> grown(new Id[larger]);
    if (used_ > 0) std::memcpy(grown.get(), out_.get(), used_ * sizeof(Id));
    out_ = std::move(grown);
    capacity_ = larger;
  }

  Prefix prefix_;
  bool metaspace_;
  Words words_;
  Merger merger_;
  AddedTokens early_, late_;
  Table<ShortEntry<Id>> short_;
  Table<LongEntry<Id>> long_;
  u64 low_mask_[16], high_mask_[16];
  std::vector<u8> scratch_;
  std::unique_ptr<Id[]> out_;
  i64 used_ = 0, capacity_ = 0;
};

}  // namespace

extern "C" {

// Build an encoder; null when memory runs out.
void* mp_create(const MpConfig* config) {
  try {
    if (config->id_bytes == 2) return static_cast<Encoder*>(new EncoderOf<u16>(*config));
    return static_cast<Encoder*>(new EncoderOf<u32>(*config));
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void mp_destroy(void* encoder) { delete static_cast<Encoder*>(encoder); }

// Encode texts [starts[i], ends[i]) of a buffer in which a space precedes each text and 256 readable bytes follow
// the last. Writes the tokens of each into `lengths` and sets `ids`, valid until the next call. Returns the number of
// tokens in all; -1 when memory runs out; -2 - i when text i has more than 2^31 - 1.
i64 mp_encode(void* encoder, const u8* buffer, const i64* starts, const i64* ends, i64 num_texts,
              std::int32_t* lengths, const void** ids) {
  try {
    const i64 total = static_cast<Encoder*>(encoder)->encode(buffer, starts, ends, num_texts, lengths);
    *ids = static_cast<Encoder*>(encoder)->ids();
    return total;
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

}  // extern "C"
