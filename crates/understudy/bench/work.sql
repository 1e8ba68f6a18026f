CREATE TABLE item (id INTEGER PRIMARY KEY, kind INTEGER, name TEXT, price REAL);
CREATE INDEX item_kind ON item (kind, name);
CREATE TABLE kind (id INTEGER PRIMARY KEY, label TEXT);
BEGIN;
WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 50)
INSERT INTO kind SELECT i, 'kind ' || i FROM n;
WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000)
INSERT INTO item SELECT i, i * 7919 % 50 + 1, printf('item %05d', i * 104729 % 20000), i * 37 % 1000 / 8.0 FROM n;
COMMIT;
SELECT k.label, count(*), round(sum(i.price), 2), min(i.name) FROM item i JOIN kind k ON k.id = i.kind
GROUP BY k.id ORDER BY 3 DESC LIMIT 3;
UPDATE item SET price = price * 1.5 WHERE name LIKE '%7%';
DELETE FROM item WHERE id % 11 = 0;
SELECT count(*), round(sum(price), 2) FROM item WHERE kind BETWEEN 10 AND 40 AND name > 'item 05000';
SELECT name, price FROM item ORDER BY price DESC, name LIMIT 5 OFFSET 1000;
SELECT count(DISTINCT substr(name, 6, 3)) FROM item;
